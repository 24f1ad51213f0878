"""Command: how soon does a run on very many rows take its first step, and in how much memory?

    python -m dopsd_jax.bench.many_rows --rows 1000000 --kind jsonl

Writes a data set of that many rows (a few pictures, every caption another one) into a temporary
folder, then trains the mini model on it with encode=online for a few steps. The log tells how long
the index took.
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from dopsd_jax.core import cli
from dopsd_jax.core.log import log

FLAGS = flags.FLAGS
KINDS = ("jsonl", "parquet")
PICTURES, STEPS = 64, 3


def write_rows(directory: Path, kind: str, count: int) -> Path:
    """A data set of `count` rows; returns what config.data is to be."""
    pictures = []
    for i in range(PICTURES):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
        pictures.append(out.getvalue())
    if kind == "jsonl":
        for i, raw in enumerate(pictures):
            (directory / f"{i}.png").write_bytes(raw)
        with (directory / "rows.jsonl").open("w") as f:
            for i in range(count):
                f.write(json.dumps({
                    "image_path": f"{i % PICTURES}.png", "caption": f"a cat {i}", "w*h": "64*64",
                }) + "\n")
        return directory / "rows.jsonl"
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = directory / "rows.parquet"
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("caption", pa.string()), ("width", pa.int32()),
                        ("height", pa.int32())])
    with pq.ParquetWriter(file, schema, use_dictionary=True) as writer:
        for start in range(0, count, 1000):
            rows = [
                {"image": {"bytes": pictures[i % PICTURES], "path": None},
                 "caption": f"a cat {i}", "width": 64, "height": 64}
                for i in range(start, min(start + 1000, count))
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return file


def measure(directory: Path, kind: str, count: int) -> tuple[float, float]:
    """Trains by the command; returns its seconds, start to end, and its peak memory in MiB."""
    data = write_rows(directory, kind, count)
    began = time.monotonic()
    # A process of its own, whose memory is measured.
    subprocess.run([
        sys.executable, "-m", "dopsd_jax.train", "--config", "configs/mini_style.py",
        "--workdir", str(directory / "run"),
        f"--config.data={data}", "--config.encode=online", "--config.buckets=64x64,80x48",
        f"--config.num_train_steps={STEPS}", "--config.preflight=off", "--config.sample_every=0",
        "--config.log_every=1",
    ], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return time.monotonic() - began, peak


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        log.info("writing %d rows", FLAGS.rows)
        seconds, peak = measure(Path(directory), FLAGS.kind, FLAGS.rows)
    print(f"{FLAGS.rows} rows as {FLAGS.kind}: from the start of the command to the end of "
          f"{STEPS} steps {seconds:.0f} s; peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    flags.DEFINE_integer("rows", 1_000_000, "How many.", lower_bound=1)
    flags.DEFINE_enum("kind", "jsonl", KINDS, "Of what kind.")
    cli.run_command(main)
