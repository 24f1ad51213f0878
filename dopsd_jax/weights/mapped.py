"""One safetensors file: opened without running anything in it, and mapped into memory."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dopsd_jax.core.files import lfs_advice
from dopsd_jax.weights.names import WeightsError

GGUF = b"GGUF"  # the first bytes of a file of llama.cpp and its like
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}


def open_safetensors(path: str | Path):
    """Opens a safetensors file, memory-mapped, as NumPy.

    Raises:
        WeightsError: A pickle by its suffix, or a file that is truncated or not safetensors.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise WeightsError(
            f"{path}: a pickled file can run code when opened and is never read here; "
            "convert it to safetensors first"
        )
    if path.is_dir():
        raise WeightsError(f"{path}: expected a .safetensors file, found a directory")
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError as e:
        raise WeightsError(f"{path}: no such file") from e
    except SafetensorError as e:
        wrong = lfs_advice(path) or _gguf_advice(path) or (
            f"truncated or not a safetensors file ({e})"
        )
        raise WeightsError(f"{path}: {wrong}") from e


def _gguf_advice(path: Path) -> str:
    """What to do where a file is one of GGUF; "" where it is not."""
    with path.open("rb") as f:
        if f.read(len(GGUF)) != GGUF:
            return ""
    return ("a GGUF file, whose blocks are not read here; take the model's .safetensors file, in "
            "bfloat16, float16 or float8")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in the header of a safetensors file.

    Raises:
        WeightsError: See `open_safetensors`.
    """
    with open_safetensors(path) as handle:
        return handle.metadata() or {}


@dataclass(frozen=True)
class Stored:
    """One tensor of a mapped file; its bytes are read when `view` is used.

    Attributes:
        file: The mapping of the whole file.
        dtype, shape: As stored.
        start, stop: Its bytes in the file.
    """

    file: mmap.mmap
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def kept(self) -> np.dtype:
        """In which it is kept where no other dtype is asked for."""
        return self.dtype

    def view(self) -> np.ndarray:
        """The tensor over the mapped pages, read-only, no copy."""
        raw = np.frombuffer(self.file, np.uint8, self.stop - self.start, self.start)
        return raw.view(self.dtype).reshape(self.shape)

    def split(self, parts: int) -> list[Stored]:
        """Equal parts along the first axis, which lie one after the other in the file."""
        shape, size = (self.shape[0] // parts, *self.shape[1:]), (self.stop - self.start) // parts
        starts = [self.start + i * size for i in range(parts)]
        return [replace(self, shape=shape, start=start, stop=start + size) for start in starts]

    def forget(self) -> None:
        """Takes the pages out of this process; the system may still cache the file."""
        if hasattr(self.file, "madvise") and self.stop > self.start:
            start = self.start - self.start % mmap.PAGESIZE
            self.file.madvise(mmap.MADV_DONTNEED, start, self.stop - start)


def map_safetensors(path: str | Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, memory-mapped and not yet read.

    The library's own reader copies every tensor once before a dtype or layout change copies it
    again; these views spare the first copy.

    Raises:
        WeightsError: See `open_safetensors`, or a dtype that NumPy does not know.
    """
    path = Path(path)
    with open_safetensors(path), path.open("rb") as f:  # the library validates header and length
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        mapping = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    unknown = sorted({t["dtype"] for t in header.values()} - set(DTYPES))
    if unknown:
        raise WeightsError(f"{path}: expected dtypes among {sorted(DTYPES)}, found {unknown}")
    return {
        name: Stored(
            mapping, np.dtype(DTYPES[t["dtype"]]), tuple(t["shape"]),
            *(8 + length + offset for offset in t["data_offsets"]),
        )
        for name, t in header.items()
    }
