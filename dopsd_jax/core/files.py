"""Atomic writing: a crash leaves the old file or the new one, never a part. Lists of paths."""

from __future__ import annotations

import os
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
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file, local or remote, that appears under its name when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as f:
        f.write(content)
        f.flush()
        if "://" not in str(path):
            os.fsync(f.fileno())
    temporary.replace(path)
