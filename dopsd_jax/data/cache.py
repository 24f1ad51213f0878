"""Arrays on disk by content: sharded safetensors with an index, local or gs:// (etils.epath).

    contexts-<id>.safetensors   some arrays, each under its key
    contexts-<id>.json          {"bytes": size of that file, "entries": {key: [dtype, shape, first
                                byte, CRC-32]}}; written after it, so what has no index is not there

A key is a hash of all that an array follows from. Nothing is ever changed in place: another image,
caption, setting or weight has another key, and its entries are added.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors.numpy import save

from dopsd_jax.core.files import write_whole
from dopsd_jax.core.log import log
from dopsd_jax.core.mirror import open_path

SHARD_BYTES = 1 << 28
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class CacheError(ValueError):
    """A cache that cannot be used, with the file at fault."""


def entry_key(**parts: Any) -> str:
    """32 hex digits that change with every part (JSON values)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cache(Mapping):
    """The arrays of a cache by key. Each is read from disk when it is asked for, and not kept.

    Opening reads the indices alone, and compares the shards' sizes with them.
    """

    def __init__(self, directory: str | epath.Path, *, repair: bool = False):
        """Opens a cache.

        Args:
            directory: A folder with shards, local or gs://.
            repair: Forget damaged shards, with a warning, so that their entries are made again;
                a folder that is not there is empty.

        Raises:
            CacheError: No such folder, an unreadable index, or shards that are missing or
                truncated, all together.
        """
        self.directory = open_path(directory)
        self._entries: dict[str, tuple[epath.Path, str, tuple[int, ...], int, int]] = {}
        if not self.directory.is_dir():
            if repair and not self.directory.exists():
                return
            found = "a file" if self.directory.exists() else "nothing"
            raise CacheError(
                f"{self.directory}: expected the folder of a cache, found {found}; make one with "
                "python -m dopsd_jax.encode"
            )
        indices = sorted(self.directory.glob("contexts-*.json"))
        with ThreadPoolExecutor(16) as pool:  # each waits for the file system
            problems = [p for p in pool.map(self._open_shard, indices) if p is not None]
        if problems and not repair:
            raise CacheError(
                "\n  ".join(p for p, _ in problems) + "\n  run python -m dopsd_jax.encode with "
                "the same config: it makes again what is damaged, and only that"
            )
        for problem, index in problems:
            log.warning("%s; its contexts are made again", problem)
            index.unlink(missing_ok=True)
            index.with_suffix(".safetensors").unlink(missing_ok=True)

    def _open_shard(self, index: epath.Path) -> tuple[str, epath.Path] | None:
        """Takes in one shard's index; returns what is wrong with it, if anything."""
        shard = index.with_suffix(".safetensors")
        try:
            values = json.loads(index.read_text())
            size, entries = int(values["bytes"]), {
                key: (shard, dtype, tuple(shape), int(start), int(crc))
                for key, (dtype, shape, start, crc) in values["entries"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            return f"{index}: not an index of a shard ({type(e).__name__}: {e})", index
        found = shard.stat().length if shard.exists() else None
        if found != size:
            found = "no such file" if found is None else f"{found}: it is truncated"
            return f"{shard}: expected {size} bytes, found {found}", index
        self._entries |= entries
        return None

    def __getitem__(self, key: str) -> np.ndarray:
        """The array of a key.

        Raises:
            CacheError: Its bytes are not those that were written.
        """
        shard, dtype, shape, start, crc = self._entries[key]
        kind = np.dtype(DTYPES[dtype])
        size = math.prod(shape) * kind.itemsize
        with shard.open("rb") as f:
            f.seek(start)
            raw = f.read(size)
        if len(raw) != size or zlib.crc32(raw) != crc:
            raise CacheError(
                f"{shard}: {len(raw)} bytes at {start} are not what was written ({size} bytes, "
                f"CRC-32 {crc}); delete the file and run python -m dopsd_jax.encode again"
            )
        return np.frombuffer(raw, kind).reshape(shape)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class CacheWriter:
    """Adds arrays to a cache, a shard at a time; what is not flushed is lost with the process."""

    def __init__(self, directory: str | epath.Path, *, shard_bytes: int = SHARD_BYTES):
        self.directory = open_path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._shard_bytes, self._bytes = shard_bytes, 0
        self._arrays: dict[str, np.ndarray] = {}

    def add(self, key: str, array: np.ndarray) -> None:
        """Keeps an array; writes a shard when enough have come together."""
        self._arrays[key] = np.ascontiguousarray(array)
        self._bytes += array.nbytes
        if self._bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what was added since the last shard."""
        if not self._arrays:
            return
        raw = save(self._arrays)
        begin = 8 + int.from_bytes(raw[:8], "little")
        entries = {}
        for key, tensor in json.loads(raw[8:begin]).items():
            start, stop = (begin + offset for offset in tensor["data_offsets"])
            crc = zlib.crc32(memoryview(raw)[start:stop])
            entries[key] = [tensor["dtype"], tensor["shape"], start, crc]
        # Named by content: two processes that make the same shard write the same file.
        name = f"contexts-{hashlib.sha256(raw).hexdigest()[:16]}"
        write_whole(self.directory / f"{name}.safetensors", raw)
        index = json.dumps({"bytes": len(raw), "entries": entries})
        write_whole(self.directory / f"{name}.json", index.encode())
        self._arrays, self._bytes = {}, 0
