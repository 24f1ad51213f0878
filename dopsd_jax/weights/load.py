"""Streaming safetensors into a parameter tree: one tensor at a time, memory-mapped, no torch."""

from __future__ import annotations

import functools
import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dopsd_jax.core import trees
from dopsd_jax.core.files import lfs_advice
from dopsd_jax.core.sharding import place
from dopsd_jax.weights.names import Rule, Slot, WeightsError, fused_parts, resolve

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}
ALIGNMENT = 64  # bytes; the CPU backend takes such arrays over without a copy
COLUMNS = 256  # of the last axis, copied at a time: a transposed copy stays in the cache


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a model directory: all shards of its index, or the single file.

    Raises:
        WeightsError: No such directory, no safetensors in it, only pickles, a malformed index, a
            missing shard, or several files without an index.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory}: expected a directory of model weights, found none")
    indices = sorted(directory.glob("*.safetensors.index.json"))
    files = sorted(directory.glob("*.safetensors"))
    if len(indices) == 1:
        names = shard_names(indices[0])
        missing = [n for n in names if not (directory / n).is_file()]
        if missing:
            raise WeightsError(
                f"{directory}: {indices[0].name} names {len(names)} shards, missing: "
                f"{', '.join(missing)}; download them again"
            )
        return [directory / n for n in names]
    if len(files) == 1:
        return files
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if not files and pickles:
        raise WeightsError(
            f"{directory}: expected .safetensors, found only pickled weights "
            f"({', '.join(pickles)}); these can run code when opened and are never read here, "
            "convert them to safetensors first"
        )
    found = ", ".join(p.name for p in [*indices, *files]) or "none"
    raise WeightsError(
        f"{directory}: expected one .safetensors file or one .safetensors.index.json, found {found}"
    )


def shard_names(index: Path) -> list[str]:
    """File names in a *.safetensors.index.json.

    Raises:
        WeightsError: No such index, or names that are no plain names of files beside it.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        plain = all(Path(n).name == n for n in names)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError(
            f"{index}: expected JSON with a weight_map from tensor to file name, "
            f"found something else ({type(e).__name__}: {e}); download it again"
        ) from e
    if not names or not plain:
        raise WeightsError(
            f"{index}: expected a weight_map to plain file names beside it, found {names}"
        )
    return names


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
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError as e:
        raise WeightsError(f"{path}: no such file") from e
    except SafetensorError as e:
        wrong = lfs_advice(path) or f"truncated or not a safetensors file ({e})"
        raise WeightsError(f"{path}: {wrong}") from e


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


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that the CPU backend takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % ALIGNMENT
    return buffer[offset : offset + size].view(dtype).reshape(shape)


def _fill(out: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Copies `value`, cast to out's dtype, into `out`, and returns it."""
    source, target = value, out
    if value.dtype == out.dtype and out.dtype.itemsize == 2:  # NumPy moves bfloat16 one by one
        source, target = value.view(np.uint16), out.view(np.uint16)
    for i in range(0, value.shape[-1] if value.ndim else 0, COLUMNS):
        target[..., i : i + COLUMNS] = source[..., i : i + COLUMNS]
    if not value.ndim:
        target[...] = source
    return out


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, layer: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(buffer, value.astype(buffer.dtype), layer, 0)


def _check_slots(
    slots: dict[str, Slot], found: dict[str, tuple], shapes: dict[str, jax.ShapeDtypeStruct]
) -> list[str]:
    """Every parameter filled exactly once with the right shape; returns what is wrong."""
    problems = []
    filled: dict[tuple[str, int | None], str] = {}
    for tensor, slot in slots.items():
        if slot.name not in shapes:
            problems.append(f"{tensor}: the network has no parameter {slot.name}")
            continue
        key = (slot.name, slot.layer)
        if key in filled:
            problems.append(f"{tensor}: parameter {slot.name} is already filled by {filled[key]}")
        filled[key] = tensor
        expected = shapes[slot.name].shape
        if slot.layer is not None and slot.layer >= expected[0]:
            problems.append(f"{tensor}: the network has only {expected[0]} layers in {slot.name}")
        expected = expected if slot.layer is None else expected[1:]
        # A stride-0 stand-in goes through the layout change without touching the file.
        stand_in = np.broadcast_to(np.int8(0), found[tensor])
        try:
            got = slot.transform.to_flax(stand_in).shape
        except ValueError:
            got = None
        if got != expected:
            problems.append(
                f"{tensor}: expected a shape that becomes {expected} in {slot.name}, "
                f"got {tuple(found[tensor])}"
            )
    stacked = {s.name for s in slots.values() if s.layer is not None}
    for name, shape in shapes.items():
        layers = range(shape.shape[0]) if name in stacked else [None]
        missing = [i for i in layers if (name, i) not in filled]
        if missing:
            which = "" if missing == [None] else f", layers {missing}"
            problems.append(f"parameter {name}{which}: no tensor in the files fills it")
    return problems


def load_tree(
    files: Iterable[str | Path],
    table: Iterable[Rule],
    shapes: trees.Tree,
    *,
    dtype=None,
    shardings: trees.Tree | None = None,
    report=None,
) -> trees.Tree:
    """Reads safetensors files into the parameter tree of a network.

    Host memory above the final arrays is at most the largest single tensor in its final dtype:
    files are mapped, not read, and stacked parameters are allocated on the device (on CPU: where
    they stay) and filled layer by layer.

    Args:
        files: Safetensors files that together hold the model.
        table: Name table of the network.
        shapes: Tree of ShapeDtypeStruct, as `jax.eval_shape` of the network's init gives.
        dtype: Dtype of the loaded floats; None keeps each file's own.
        shardings: Tree of shardings like `shapes`; None is the default device.
        report: Called with (tensors done, tensors in all) while loading.

    Returns:
        Tree of jax arrays like `shapes`.

    Raises:
        WeightsError: Every tensor without a rule, parameter without a tensor, wrong shape, tensor
            of integers for a parameter of floats and unreadable file, together.
    """
    flat_shapes = trees.flatten(shapes)
    flat_shardings = trees.flatten(shardings) if shardings is not None else {}
    files = [Path(f) for f in files]
    table = list(table)
    stored = _split_fused(table, _map_all(files))
    slots = _match(files, table, stored, flat_shapes)
    flat: dict[str, jax.Array | np.ndarray] = {}
    for done, (tensor, slot) in enumerate(slots.items()):
        name, sharding = slot.name, flat_shardings.get(slot.name)
        value = slot.transform.to_flax(stored[tensor].view())
        is_float = jnp.issubdtype(value.dtype, jnp.floating)
        kind = np.dtype(dtype) if dtype is not None and is_float else value.dtype
        if slot.layer is None:
            flat[name] = place(_fill(_aligned(value.shape, kind), value), sharding)
        elif _on_cpu(sharding):  # the stack is host memory anyway
            if name not in flat:
                flat[name] = _aligned(flat_shapes[name].shape, kind)
            _fill(flat[name][slot.layer], value)
        else:
            if name not in flat:
                flat[name] = _empty(flat_shapes[name].shape, kind, sharding)
            part = _like(_fill(_aligned(value.shape, kind), value), sharding)
            flat[name] = _write(flat[name], slot.layer, part)
        # Else many tensors wait in host memory at once.
        jax.block_until_ready(flat[name])
        value = part = None
        stored[tensor].forget()
        if report is not None:
            report(done + 1, len(slots))
    for name, value in flat.items():
        if isinstance(value, np.ndarray):
            flat[name] = place(value, flat_shardings.get(name))
    return trees.unflatten(flat)


def _map_all(files: list[Path]) -> dict[str, Stored]:
    """Tensors of all files; duplicates and unreadable files are raised together."""
    stored: dict[str, Stored] = {}
    origin: dict[str, Path] = {}
    problems = []
    for file in files:
        try:
            tensors = map_safetensors(file)
        except WeightsError as e:
            problems.append(str(e))
            continue
        problems += [
            f"{tensor}: stands in more than one file, {origin[tensor].name} and {file.name}"
            for tensor in sorted(set(tensors) & set(stored))
        ]
        stored |= tensors
        origin |= dict.fromkeys(tensors, file)
    if problems:
        raise WeightsError("\n".join(problems))
    return stored


def _split_fused(table: list[Rule], stored: dict[str, Stored]) -> dict[str, Stored]:
    """The same with every fused tensor in parts; one that cannot be stays, and fits no rule."""
    fused = fused_parts(table, stored)
    found = {}
    for tensor, whole in stored.items():
        parts = fused.get(tensor, ())
        if parts and whole.shape and whole.shape[0] % len(parts) == 0:
            found |= zip(parts, whole.split(len(parts)), strict=True)
        else:
            found[tensor] = whole
    return found


def _match(
    files: list[Path], table: Iterable[Rule], stored: dict[str, Stored],
    shapes: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, Slot]:
    """Where every tensor goes, in the order of the files."""
    found = {tensor: s.shape for tensor, s in stored.items()}
    slots, problems = resolve(table, found)
    problems += _check_slots(slots, found, shapes)
    problems += [
        f"{tensor}: expected floats for {slot.name}, found {stored[tensor].dtype}; quantised "
        "weights are not read"
        for tensor, slot in slots.items()
        if slot.name in shapes and jnp.issubdtype(shapes[slot.name].dtype, jnp.floating)
        and not jnp.issubdtype(stored[tensor].dtype, jnp.floating)
    ]
    if problems:
        where = ", ".join(str(f) for f in files[:3]) + (" ..." if len(files) > 3 else "")
        listed = "\n  ".join(problems[:40])
        more = f"\n  ... and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise WeightsError(
            f"{where}: {len(problems)} tensors or parameters do not fit the network:\n  "
            f"{listed}{more}"
        )
    return slots


def _on_cpu(sharding) -> bool:
    """Whether arrays placed so live in the memory of this machine, on one device."""
    if sharding is None:
        return jax.default_backend() == "cpu"
    return len(sharding.device_set) == 1 and next(iter(sharding.device_set)).platform == "cpu"


def _empty(shape, dtype, sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


def _like(part: np.ndarray, sharding) -> jax.Array:
    """Places one layer with the stacked array's sharding less its leading axis."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return place(part, sharding)
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
    return place(part, jax.sharding.NamedSharding(sharding.mesh, spec))
