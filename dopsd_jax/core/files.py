"""Atomic writing: a crash leaves the old file or the new one, never a part. Lists of paths."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

LFS_POINTER = b"version https://git-lfs"


def split_paths(text: str) -> list[str]:
    """The paths of "a,b", or the one whose own name has commas in it, if it is there.

    Raises:
        ValueError: Nothing between commas.
    """
    whole = os.path.exists(os.path.expanduser(text))  # Path.exists fails where a list is too long
    paths = [text] if whole else [part.strip() for part in text.split(",")]
    if not all(paths):
        raise ValueError(f"expected paths between commas, got {text!r}")
    return paths


def lfs_advice(path: Path) -> str:
    """What to do where git-lfs left a small text in place of the file; "" where it did not."""
    with path.open("rb") as f:
        if f.read(len(LFS_POINTER)) != LFS_POINTER:
            return ""
    return "this is a git-lfs pointer, not the file itself; run `git lfs pull` where it was cloned"


def write_atomic(path: str | Path, text: str) -> None:
    """Writes a local file so that a crash leaves either the old or the new text."""
    write_whole(epath.Path(path), text.encode())


@contextlib.contextmanager
def new_sibling(path: str | Path) -> Iterator[Path]:
    """A temporary name beside a local path, for what is renamed to it when it is whole.

    What is left under that name is removed at the end. The folder of both is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)  # a killed process with the same id may have left one
    try:
        yield temporary
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Waits until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file, local or remote, that appears under its name when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as f:
        f.write(content)
        f.flush()
        if "://" not in str(path):
            os.fsync(f.fileno())
    temporary.replace(path)
