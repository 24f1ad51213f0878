"""How much memory a process has taken so far, of the host and of its devices, and what is left."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import jax

from dopsd_jax.core.log import log

STATUS = Path("/proc/self/status")
MEMINFO = Path("/proc/meminfo")


def peak() -> int:
    """The most resident memory of this process up to now, bytes; mapped files count.

    On Linux of this program alone (VmHWM of proc(5)): getrusage(2) would pass on what the process
    that started it had. Elsewhere as getrusage tells it.
    """
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024


def available() -> int:
    """Bytes of this machine's memory that programs may still take without others losing theirs.

    On Linux as the kernel estimates it (MemAvailable of proc(5)), elsewhere all memory there is.
    """
    if MEMINFO.is_file():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def report() -> str:
    """The peak in words, for the log."""
    return f"host memory so far at most {peak() / 1e9:.2f} GB, mapped files included"


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What a program needs on one device, bytes; new arrays that take the place of old ones, and
    so need nothing, are subtracted."""
    m = compiled.memory_analysis()
    return {"arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes,
            "results": m.output_size_in_bytes, "in place": -m.alias_size_in_bytes}


def log_devices(phase: str) -> None:
    """Says how much of an accelerator was taken at most when a phase of a run is over.

    Args:
        phase: What is done, as the line of the log begins.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        log.info("%s; the device held at most %.2f of %.2f GiB so far", phase,
                 stats["peak_bytes_in_use"] / 2**30, stats.get("bytes_limit", 0) / 2**30)
