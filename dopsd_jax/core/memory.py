"""How much host memory a process has taken so far, and how much is left."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

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
