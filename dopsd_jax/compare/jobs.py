"""Commands of a comparison, several at a time, each with its output in a file."""

from __future__ import annotations

import dataclasses
import os
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import jax

from dopsd_jax.core.log import log

MOST_AT_ONCE = 8  # trainings; each takes 1.3 GB


@dataclasses.dataclass(frozen=True)
class Job:
    """A command of the package.

    Attributes:
        command: Module and arguments, what comes after `python -m`.
        logged: Where its output goes; begins with the command itself.
    """

    command: tuple[str, ...]
    logged: Path


def at_once(count: int) -> int:
    """How many of so many jobs run beside each other: on a CPU one for each core, else one."""
    cores = len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 1
    return max(min(cores, MOST_AT_ONCE, count), 1)


def run_all(jobs: Sequence[Job], what: str) -> None:
    """Runs commands to their ends, and logs how many are done and the time left.

    They end with this process, even if it is killed.

    On a CPU several at a time, each on cores of its own: that is faster than one after the other
    on all cores, which small networks leave idle, and compiling uses only one.

    Args:
        jobs: The commands.
        what: They are, in the plural, for the log.

    Raises:
        ValueError: A command ended with an error.
    """
    if not jobs:
        return
    cores, parts = sorted(os.sched_getaffinity(0)), at_once(len(jobs))
    shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for i in range(parts):
        shares.put(set(cores[i::parts]))
    began = time.monotonic()

    def run(job: Job) -> None:
        share = shares.get()
        try:
            os.sched_setaffinity(0, share)  # of this thread, and of what it starts
            _run(job)
        finally:
            shares.put(share)

    with ThreadPool(parts) as pool:
        for done, _ in enumerate(pool.imap_unordered(run, jobs), 1):
            spent = time.monotonic() - began
            log.info("%d of %d %s, %.0f s, %.0f s left", done, len(jobs), what, spent,
                     spent / done * (len(jobs) - done))


def _run(job: Job) -> None:
    job.logged.parent.mkdir(parents=True, exist_ok=True)
    with job.logged.open("w") as f:
        f.write("$ python -m " + " ".join(job.command) + "\n")
        f.flush()
        command = [sys.executable, "-m", "dopsd_jax.core.child", *job.command]
        done = subprocess.run(command, check=False, stdout=f, stderr=f)
    if done.returncode:
        last = "".join(job.logged.read_text().splitlines(keepends=True)[-5:])
        raise ValueError(
            f"{job.command[0]} ended with status {done.returncode}; the end of {job.logged}:\n"
            f"{last}"
        )
