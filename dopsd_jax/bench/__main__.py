"""Command: how fast is the D-OPSD LoRA step here, and beside a torch loop of the published one?

    python -m dopsd_jax.bench --out runs/bench            # Z-Image's size, on an NVIDIA GPU
    python -m dopsd_jax.bench --out runs/bench --model small --sides 64   # anywhere, to try it

Weights are random and made in place; nothing is downloaded. Every measurement runs in a process of
its own. What does not fit into memory, or into --seconds, is said to be so. Writes <out>/bench.md
and bench.json after every measurement.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from dopsd_jax.bench.case import MODELS, Case, Measured
from dopsd_jax.bench.table import Result, as_markdown
from dopsd_jax.core import cli
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import log
from dopsd_jax.models.layers import REMAT_POLICIES
from dopsd_jax.models.quantization import KINDS

FLAGS = flags.FLAGS
OURS, AGAIN, TORCH = "dopsd_jax", "dopsd_jax, second start", "torch"
COMPILED = "torch, compiled"
MODULES = {OURS: "ours", AGAIN: "ours", TORCH: "torch_loop", COMPILED: "torch_loop"}
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "out of memory")
LARGEST_BATCH = 16
LENGTHS = 512, 1024  # tokens of student and teacher: what a config has where it says nothing


class Bench:
    """Runs measurements one after the other until the time is over."""

    def __init__(self, out: Path, seconds: float):
        self._out, self._end = out, time.monotonic() + seconds
        shutil.rmtree(out / "compiled", ignore_errors=True)  # the first start is to be a first one
        self.results: list[Result] = []

    def run(self, program: str, case: Case) -> Measured | None:
        """One measurement in a child process; None where there is none, and the table says why."""
        left = self._end - time.monotonic()
        log.info("%s, %d px, batch %d, remat %s ..", program, case.side, case.batch, case.remat)
        cache = self._out / "compiled"
        found = _child(program, case, left, cache) if left > 0 else "no time left"
        self.results.append(Result(program, case, found))
        log.info("  %s", found if isinstance(found, str) else f"{found.seconds:.3f} s per update")
        write_atomic(self._out / "bench.md", as_markdown(self.results))
        write_atomic(self._out / "bench.json", json.dumps(
            [dataclasses.asdict(r) for r in self.results], indent=2
        ))
        return None if isinstance(found, str) else found

    def everything(
        self, sides: list[int], case: Case, policies: Sequence[str], base_dtypes: Sequence[str] = ()
    ) -> None:
        """First what matters most: one picture of the first size with every policy of remat, and
        torch beside it; then other sizes and lengths with the fastest, then the same with quantised
        bases, then larger batches."""
        first = dataclasses.replace(case, side=sides[0], batch=1)
        found = {
            policy: self.run(OURS, dataclasses.replace(first, remat=policy)) for policy in policies
        }
        seconds = {policy: m.seconds for policy, m in found.items() if m is not None}
        best = min(seconds, key=seconds.__getitem__) if seconds else policies[-1]
        first = dataclasses.replace(first, remat=best)
        self.run(TORCH, first)
        self.run(COMPILED, dataclasses.replace(first, compiled=True))
        longer = dataclasses.replace(first, student_tokens=LENGTHS[0], teacher_tokens=LENGTHS[1])
        for other in (*(dataclasses.replace(first, side=side) for side in sides[1:]), longer):
            for program in (OURS, TORCH):
                self.run(program, other)
        self.run(AGAIN, first)
        for kind in base_dtypes:
            self.run(OURS, dataclasses.replace(first, base_dtype=kind))
        # What keeps more than the fastest policy does gains nothing by more pictures.
        policies = policies[list(policies).index(best):]
        for side in sides:
            self.largest(dataclasses.replace(first, side=side), policies)

    def largest(self, case: Case, policies: Sequence[str]) -> None:
        """Doubles the batch while some policy fits; the torch loop gets the last one that did."""
        fits, batch = None, 2
        while batch <= LARGEST_BATCH and policies:
            larger = dataclasses.replace(case, batch=batch, remat=policies[0])
            if self.run(OURS, larger) is None:
                policies = policies[1:]
            else:
                fits, batch = larger, 2 * batch
        if fits is not None:
            self.run(TORCH, fits)


def _child(program: str, case: Case, seconds: float, cache: Path) -> Measured | str:
    """The measurement, or in a few words why there is none; compiled programs go to `cache`."""
    command = [sys.executable, "-m", f"dopsd_jax.bench.{MODULES[program]}", case.to_json()]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
        )
    except subprocess.TimeoutExpired:
        return "no time left"
    if done.returncode == 0:
        return Measured(**json.loads(done.stdout.splitlines()[-1]))
    if any(words in done.stderr for words in OUT_OF_MEMORY):
        return "out of memory"
    last = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
    return f"failed: {last[:160]}"


def main() -> None:
    sides = [int(s) for s in FLAGS.sides]
    if not FLAGS.remat or (wrong := set(FLAGS.remat) - set(REMAT_POLICIES)):
        raise ValueError(f"--remat: expected some of {', '.join(REMAT_POLICIES)}, got "
                         f"{', '.join(sorted(wrong)) if FLAGS.remat else 'nothing'}")
    if wrong := set(FLAGS.base_dtype) - set(KINDS):
        raise ValueError(f"--base_dtype: expected some of {', '.join(KINDS)}, got "
                         f"{', '.join(sorted(wrong))}")
    if not sides or any(s < 16 or s % 16 for s in sides):
        raise ValueError(f"--sides: expected pixels in multiples of 16, got {FLAGS.sides}")
    out = Path(FLAGS.out)
    cli.check_directory(out)
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")  # this process leaves the device to its children
    case = Case(
        FLAGS.model, sides[0], 1, FLAGS.updates, FLAGS.student_tokens, FLAGS.teacher_tokens
    )
    bench = Bench(out, FLAGS.seconds)
    bench.everything(sides, case, FLAGS.remat, FLAGS.base_dtype)
    print(as_markdown(bench.results))
    print(f"{out}/bench.md, bench.json")
    if not any(isinstance(r.found, Measured) for r in bench.results):
        raise ValueError("bench: nothing could be measured; the table says why")


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/bench", "Directory of the table.")
    flags.DEFINE_enum("model", "z-image", sorted(MODELS), "Size of the transformer.")
    flags.DEFINE_list("sides", ["1024", "512"], "Pixels of square pictures; the first counts most.")
    flags.DEFINE_integer("updates", 10, "Timed updates per measurement.", lower_bound=1)
    flags.DEFINE_integer("student_tokens", 128, "Of the prompt.", lower_bound=32)
    flags.DEFINE_integer("teacher_tokens", 512, "Of prompt and picture.", lower_bound=32)
    flags.DEFINE_list("remat", ["linears", "matmuls", "attention", "full"], "Our policies of "
                      "rematerialisation, the one that computes least again first.")
    flags.DEFINE_list("base_dtype", ["int8", "w8a8", "fp8", "nf4"], "Quantised bases to measure "
                      "with the fastest policy.")
    flags.DEFINE_float("seconds", 540.0, "When to stop.", lower_bound=1.0)
    cli.run_command(main)
