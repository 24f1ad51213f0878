"""A run's directory in a bucket, with a copy of its small files on this machine.

Objects of a bucket cannot be appended to or locked, so a run in gs:// writes its numbers and
pictures here and sends them there; checkpoints go there at once, from every process.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import fsspec
from etils import epath

from dopsd_jax.core.checks import path_problem
from dopsd_jax.core.log import log

CHECKPOINTS = "checkpoints"
REMOTE = ".remote"  # in the copy: the address of what it is a copy of
PUSH_EVERY_S = 60.0
LOCAL_ONLY = (REMOTE, ".lock")


def is_remote(workdir: str | Path) -> bool:
    """Whether a path is an address, as gs://bucket/run."""
    return "://" in str(workdir)


def open_path(path: str | Path) -> epath.Path:
    """A local path, or an address that this machine can open.

    Raises:
        ValueError: An address whose package is not installed, or of a kind that nothing opens.
    """
    if is_remote(path):
        try:
            scheme = str(path).split("://", 1)[0]
            fsspec.get_filesystem_class("gcs" if scheme == "gs" else scheme)  # as epath does
        except (ImportError, ValueError) as e:
            raise ValueError(
                f"{path}: expected an address that this machine can open ({e}); for gs:// run "
                "`pip install gcsfs`, which comes with the extra dopsd_jax[tpu]"
            ) from e
    return epath.Path(path)


def caches() -> Path:
    """Where this project keeps what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dopsd_jax"


def local_copy(workdir: str | Path) -> Path:
    """The directory itself, or of one in a bucket an up-to-date copy, without its checkpoints.

    Raises:
        ValueError: A path that no file system takes.
    """
    if problem := path_problem(str(workdir)):
        raise ValueError(f"{workdir!s:.60}.. {problem}; choose another path")
    if not is_remote(workdir):
        return Path(workdir)
    address = str(workdir).rstrip("/")
    name = hashlib.sha256(address.encode()).hexdigest()[:16]
    local = caches() / "workdirs" / name / address.rsplit("/", 1)[1]
    Mirror(address, local).pull()
    return local


def address_of(workdir: str | Path) -> str:
    """The address that a local copy stands for; of any other directory its own path."""
    marker = Path(workdir) / REMOTE
    return marker.read_text() if marker.is_file() else str(workdir)


def checkpoints_of(workdir: str | Path) -> epath.Path:
    """Where a run's checkpoints are, which a local copy does not hold."""
    return open_path(address_of(workdir)) / CHECKPOINTS


def mirror_of(workdir: str | Path) -> Mirror | None:
    """The Mirror that sends a local copy's files to its bucket; None for any other directory."""
    address = address_of(workdir)
    return Mirror(address, Path(workdir)) if is_remote(address) else None


class Mirror:
    """Keeps a local directory and one in a bucket alike, but for checkpoints."""

    def __init__(self, address: str, local: Path):
        self._remote, self._local = open_path(address), local
        self._sent: dict[str, tuple[int, int]] = {}
        self._pushed = time.monotonic()

    def pull(self) -> None:
        """Fetches every file, and removes what is not there from the local directory."""
        self._local.mkdir(parents=True, exist_ok=True)
        (self._local / REMOTE).write_text(str(self._remote))
        there = set()
        for file in _files(self._remote):
            name = str(file.relative_to(self._remote))
            there.add(name)
            target = self._local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
            self._sent[name] = _state(target)
        for name in self._here().keys() - there:
            (self._local / name).unlink()

    def push(self, *, now: bool = False) -> None:
        """Sends the files that changed, if the last time is long enough ago.

        Args:
            now: At once.
        """
        if not now and time.monotonic() - self._pushed < PUSH_EVERY_S:
            return
        changed = {n: state for n, state in self._here().items() if self._sent.get(n) != state}
        for name, state in changed.items():
            target = self._remote / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((self._local / name).read_bytes())  # appears when it is complete
            self._sent[name] = state
        self._pushed = time.monotonic()
        if changed:
            log.debug("%s: sent %d files", self._remote, len(changed))

    def _here(self) -> dict[str, tuple[int, int]]:
        """Name -> (bytes, time) of the local files that belong to the run."""
        found = {}
        for file in self._local.rglob("*"):
            name = file.relative_to(self._local)
            if file.is_file() and name.parts[0] not in (CHECKPOINTS, *LOCAL_ONLY):
                found[str(name)] = _state(file)
        return found


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _files(directory: epath.Path) -> list[epath.Path]:
    """All files below a directory, but for checkpoints."""
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        if path.name == CHECKPOINTS:
            continue
        found += _files(path) if path.is_dir() else [path]
    return found
