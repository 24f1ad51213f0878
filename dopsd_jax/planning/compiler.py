"""Compiles for machines that are not there, in a child process, as far as a question needs.

Of a TPU compile, code generation is nine tenths; memory and schedule are known before it. XLA
writes both to files, so the child is stopped as soon as they are there. A GPU compile is finished,
without trying kernels against each other, which takes a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dopsd_jax.planning import hlo

HLO = "*after_optimizations_after_buffer_assignment.txt"
MEMORY = "*after_optimizations-memory-usage-report.txt"
SETTLE = 1.5  # seconds that the files of one compile need after the first of them appears
FINAL = "final_hlo.txt"  # what the child writes of a finished executable
COUNTED = "memory.json"  # what it writes of its memory: bytes of arguments, temporaries, ..


class DoesNotFit(ValueError):
    """A program that needs more memory than the chip has.

    Attributes:
        needed, available: Bytes, as the compiler says it; None where it does not.
    """

    def __init__(self, message: str, needed: float | None, available: float | None):
        super().__init__(message)
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Dump:
    """What is known of a compiled program.

    Attributes:
        text: Scheduled HLO.
        memory: Of one device.
        seconds: That the child ran.
        cycles: The compiler's estimate; 0 unless the executable was built.
    """

    text: str
    memory: hlo.Memory
    seconds: float
    cycles: int = 0


def has_tpu_compiler() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def has_gpu_compiler() -> bool:
    """Whether JAX's CUDA plugin is installed, by any name that it has."""
    return bool(importlib.metadata.entry_points(group="jax_plugins")) and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
    )


def child_environment() -> dict[str, str]:
    """For a process that compiles for TPU where there is none, beside others that do."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def compile_in_child(
    command: Sequence[str], module: str, *, full: bool = False, timeout: float = 3600
) -> Dump:
    """Runs a command that compiles a program, and reads what XLA writes of it.

    Args:
        command: Its last argument will be a directory, where it leaves FINAL if `full`.
        module: Name of the jitted function, of whose program alone files are written.
        full: Let the child finish: the compiler then also says how many cycles it expects.
        timeout: Seconds after which the child is stopped.

    Raises:
        DoesNotFit: The program needs more memory than the chip has.
        RuntimeError: The child failed in another way; with the end of what it said.
    """
    flags = ("--xla_dump_to={} --xla_dump_hlo_as_text=true "
             f"--xla_dump_hlo_module_re={module}")
    with _directory() as directory:
        seconds = _run(command, directory, flags.format(directory), full, timeout)
        hlo_file, memory_file = (_only(directory, p) for p in (HLO, MEMORY))
        final = directory / FINAL
        cycles = hlo.estimated_cycles(hlo.parse(final.read_text())) if final.is_file() else 0
        return Dump(
            hlo_file.read_text(), hlo.parse_memory(memory_file.read_text()), seconds, cycles
        )


def compile_for_gpu(command: Sequence[str], *, timeout: float = 3600) -> Dump:
    """Runs a command that compiles a program for a GPU, and reads what it leaves.

    Args:
        command: Its last argument will be a directory, where it leaves FINAL and COUNTED.
        timeout: Seconds after which the child is stopped.

    Raises:
        RuntimeError: The child failed; with the end of what it said.
    """
    with _directory() as directory:
        seconds = _run(command, directory, "--xla_gpu_autotune_level=0", True, timeout)
        total = sum(json.loads((directory / COUNTED).read_text()).values())
        return Dump((directory / FINAL).read_text(), hlo.Memory(total, []), seconds)


@contextlib.contextmanager
def _directory():
    with tempfile.TemporaryDirectory(prefix="dopsd_plan_") as name:
        yield Path(name)


def _run(
    command: Sequence[str], directory: Path, flags: str, full: bool, timeout: float
) -> float:
    """Runs the child with XLA's flags until it ends or, unless `full`, is stopped; its seconds."""
    start = time.monotonic()
    with (directory / "said").open("wb") as said:
        child = subprocess.Popen(
            [*command, str(directory)], env=child_environment() | {"XLA_FLAGS": flags},
            stdout=said, stderr=subprocess.STDOUT,
        )
        try:
            stopped = _wait(child, directory, full, start + timeout)
        finally:
            if child.poll() is None:
                child.terminate()
            child.wait()
    if not stopped and child.returncode:
        raise _failure((directory / "said").read_text(errors="replace"))
    return time.monotonic() - start


def _wait(child: subprocess.Popen, directory: Path, full: bool, end: float) -> bool:
    """Waits for the child's end or, unless `full`, for its files; says whether it was stopped."""
    while child.poll() is None:
        if not full and list(directory.glob(HLO)):
            time.sleep(SETTLE)
            child.terminate()
            return True
        if time.monotonic() > end:
            raise RuntimeError("the compiler did not answer in time")
        time.sleep(0.2)
    return False


def _only(directory: Path, pattern: str) -> Path:
    """The file of a pattern; of several the largest: small programs are compiled beside it."""
    found = sorted(directory.glob(pattern), key=lambda p: p.stat().st_size)
    if not found:
        raise RuntimeError(f"the compiler wrote no {pattern}; another version of libtpu?")
    return found[-1]


_SCALE = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _failure(text: str) -> Exception:
    lines = [line for line in text.splitlines() if line.strip()]
    for line in lines:
        if "exceeds available" in line or "Ran out of memory" in line:
            numbers = [
                float(n) * _SCALE[unit] for n, unit in re.findall(r"([\d.]+)\s?([KMGT])", line)
            ]
            needed, available = (*numbers[:2], None, None)[:2]
            return DoesNotFit(line.strip()[:300], needed, available)
    said = "\n  ".join(line[:300] for line in lines[-6:])
    return RuntimeError(f"compiling failed:\n  {said}")
