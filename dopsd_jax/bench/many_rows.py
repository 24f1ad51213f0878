"""Command: how soon does a run on very many rows take its first step, and in how much memory?

    python -m dopsd_jax.bench.many_rows --rows 1000000 --kind jsonl

Writes a data set of that many rows (a few pictures, every caption another one) into a temporary
folder, then trains the mini model on it with encode=online for a few steps.
"""

from __future__ import annotations

import io
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from configs import mini_style
from dopsd_jax import train as train_lib
from dopsd_jax import workdir as workdir_lib
from dopsd_jax.core import cli
from dopsd_jax.core.log import log
from dopsd_jax.data import datasets

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


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(directory: Path, kind: str, count: int) -> dict[str, float]:
    """Seconds from the start of reading to the index and to the last of STEPS steps."""
    config = mini_style.get_config()
    config.update({
        "data": str(write_rows(directory, kind, count)), "encode": "online",
        "buckets": "64x64,80x48", "num_train_steps": STEPS, "preflight": "off", "sample_every": 0,
        "log_every": 1, "checkpoint_every": STEPS,
    })
    told = {"written_peak": peak_bytes()}
    read = datasets.read_data
    began = time.monotonic()

    def timed(*args):
        data = read(*args)
        told.update(index_s=time.monotonic() - began, index_peak=peak_bytes())
        return data

    train_lib.read_data = timed
    train_lib.train(config, directory / "run")
    return told | {"trained_s": time.monotonic() - began, "peak": peak_bytes()}


def main() -> None:
    workdir_lib.enable_compilation_cache()
    with tempfile.TemporaryDirectory() as directory:
        log.info("writing %d rows", FLAGS.rows)
        found = measure(Path(directory), FLAGS.kind, FLAGS.rows)
    mib = {name: found[name] / 2**20 for name in ("written_peak", "index_peak", "peak")}
    print(f"{FLAGS.rows} rows as {FLAGS.kind}: index after {found['index_s']:.1f} s, {STEPS} steps "
          f"after {found['trained_s']:.1f} s; peak memory {mib['written_peak']:.0f} MiB before, "
          f"{mib['index_peak']:.0f} with the index, {mib['peak']:.0f} at the end")


if __name__ == "__main__":
    flags.DEFINE_integer("rows", 1_000_000, "How many.", lower_bound=1)
    flags.DEFINE_enum("kind", "jsonl", KINDS, "Of what kind.")
    cli.run_command(main)
