"""Streaming safetensors into a parameter tree: one tensor at a time, memory-mapped, no torch."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core import trees
from dopsd_jax.core.sharding import place
from dopsd_jax.models import quantization
from dopsd_jax.weights import comfy_quantized
from dopsd_jax.weights.comfy_quantized import Tensor
from dopsd_jax.weights.mapped import PICKLES, map_safetensors, read_metadata
from dopsd_jax.weights.names import Rule, Slot, WeightsError, fused_parts, resolve

ALIGNMENT = 64  # bytes; the CPU backend takes such arrays over without a copy
COLUMNS = 256  # of the last axis, copied at a time: a transposed copy stays in the cache
SHOWN = 40  # problems of a file, in a message


@dataclass(frozen=True)
class Prefixes:
    """What may stand before all names of a part of a model.

    Attributes:
        own: Regex of it; it is taken off.
        others: Regex of what names of other parts begin with, in a file of a whole model; such
            tensors are left out of a file that has names of its own with a prefix.
    """

    own: str
    others: str


# As ComfyUI writes them.
_OF_PARTS = {
    "transformer": r"(?:model\.)?diffusion_model\.",
    "vae": r"(?:vae|first_stage_model)\.",
    "text_encoder": r"(?:text_encoders\.)?(?:\w+\.)?transformer\.",
}
PREFIXES = {
    part: Prefixes(own, "|".join(o for p, o in _OF_PARTS.items() if p != part)
                   + r"|text_encoders\.\w+\.logit_scale")
    for part, own in _OF_PARTS.items()
}


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


_quantise = jax.jit(quantization.quantise, static_argnums=(1, 2))


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


def open_tensors(
    files: Iterable[str | Path], prefixes: Prefixes | None = None
) -> dict[str, Tensor]:
    """The tensors of a model's files by name, mapped and not yet read.

    Scales and markers of quantised weights are taken in by the weights they belong to.

    Args:
        files: Safetensors files that together hold the model.
        prefixes: What may stand before the names.

    Raises:
        WeightsError: Unreadable files, tensors in more than one of them, and quantised weights
            that are not read, together.
    """
    files = [Path(f) for f in files]
    stored, problems = _map_all(files)
    layers = {}
    for file in files if not problems else ():
        text = read_metadata(file).get(comfy_quantized.METADATA, "{}")
        try:
            layers |= json.loads(text)["layers"] if text != "{}" else {}
        except (ValueError, KeyError, TypeError):
            problems.append(f"{file}, {comfy_quantized.METADATA}: expected JSON with layers, got "
                            f"{text:.60}")
    if prefixes is not None:
        stored, layers = (_without(prefixes, named) for named in (stored, layers))
    tensors, unread = comfy_quantized.values(stored, layers)
    problems += [f"{_where(files)}: {problem}" for problem in unread]
    if problems:
        raise WeightsError(_listed(problems))
    return tensors


def _without(prefixes: Prefixes, named: Mapping) -> dict:
    """The same by names without the prefix; see `Prefixes`."""
    own, others = re.compile(prefixes.own), re.compile(prefixes.others)
    starts = {name: own.match(name) for name in named}
    if not any(starts.values()):
        return dict(named)
    return {
        name[start.end():] if start else name: named[name] for name, start in starts.items()
        if start or not others.match(name)
    }


def load_tree(
    files: Iterable[str | Path],
    table: Iterable[Rule],
    shapes: trees.Tree,
    *,
    dtype=None,
    shardings: trees.Tree | None = None,
    report=None,
    prefixes: Prefixes | None = None,
    quantise: str = "",
) -> trees.Tree:
    """Reads safetensors files into the parameter tree of a network.

    Host memory above the final arrays is at most the largest single tensor in its final dtype
    (of quantised weights: in float32): files are mapped, not read, and stacked parameters are
    allocated on the device (on CPU: where they stay) and filled layer by layer.

    Args:
        files: Safetensors files that together hold the model.
        table: Name table of the network.
        shapes: Tree of ShapeDtypeStruct, as `jax.eval_shape` of the network's init gives.
        dtype: Dtype of the loaded floats; None keeps each file's own, bfloat16 for what is
            quantised.
        shardings: Tree of shardings like what is returned; None is the default device.
        report: Called with (tensors done, tensors in all) while loading.
        prefixes: What may stand before the names in the files.
        quantise: A key of quantization.KINDS: kernels of stacked layers are quantised one by one
            on the device, on which they are never all in floats. "" for none.

    Returns:
        Tree of jax arrays like `shapes`, or as `quantization.quantise_tree` makes of them.

    Raises:
        WeightsError: Every tensor without a rule, parameter without a tensor, wrong shape, tensor
            of integers for a parameter of floats and unreadable file, together.
    """
    flat_shapes = trees.flatten(shapes)
    flat_shardings = trees.flatten(shardings) if shardings is not None else {}
    stored, slots = _open(files, table, flat_shapes, prefixes)
    small = quantization.names(shapes) if quantise else set()
    flat: dict[str, quantization.Kernel | np.ndarray] = {}
    for done, (tensor, slot) in enumerate(slots.items()):
        name, sharding = slot.name, flat_shardings.get(slot.name)
        value = slot.transform.to_flax(stored[tensor].view())
        is_float = jnp.issubdtype(value.dtype, jnp.floating)
        kind = np.dtype(dtype) if dtype is not None and is_float else stored[tensor].kept
        if slot.layer is None:
            flat[name] = place(_fill(_aligned(value.shape, kind), value), sharding)
        elif name not in small and _on_cpu(sharding):  # the stack is host memory anyway
            if name not in flat:
                flat[name] = _aligned(flat_shapes[name].shape, kind)
            _fill(flat[name][slot.layer], value)
        else:
            part = place(_fill(_aligned(value.shape, kind), value), _of_layer(sharding))
            if name in small:
                part = _quantise(part, quantise, kind)
            if name not in flat:
                flat[name] = _empty_stack(flat_shapes[name].shape[0], part, sharding)
            flat[name] = jax.tree.map(
                lambda stack, x, layer=slot.layer: _write(stack, layer, x), flat[name], part
            )
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


def kept_dtypes(
    files: Iterable[str | Path], table: Iterable[Rule], shapes: trees.Tree,
    prefixes: Prefixes | None = None,
) -> dict[tuple[str, int | None], np.dtype]:
    """In which dtype files keep each parameter, by its name and layer; no weights are read.

    Quantised ones count as bfloat16, as `load_tree` has them.

    Raises:
        WeightsError: See `load_tree`, so that this checks files too.
    """
    stored, slots = _open(files, table, trees.flatten(shapes), prefixes)
    return {(slot.name, slot.layer): stored[tensor].kept for tensor, slot in slots.items()}


def _open(
    files: Iterable[str | Path], table: Iterable[Rule],
    shapes: dict[str, jax.ShapeDtypeStruct], prefixes: Prefixes | None,
) -> tuple[dict[str, Tensor], dict[str, Slot]]:
    """All tensors, fused ones in parts, and where each goes."""
    files, table = [Path(f) for f in files], list(table)
    stored = _split_fused(table, open_tensors(files, prefixes))
    return stored, _match(files, table, stored, shapes)


def _map_all(files: list[Path]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of all files, and which stand in two of them or cannot be read."""
    stored: dict[str, Tensor] = {}
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
    return stored, problems


def _split_fused(table: list[Rule], stored: dict[str, Tensor]) -> dict[str, Tensor]:
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
    files: list[Path], table: Iterable[Rule], stored: dict[str, Tensor],
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
        raise WeightsError(
            f"{_where(files)}: {len(problems)} tensors or parameters do not fit the network:\n  "
            + _listed(problems)
        )
    return slots


def _where(files: list[Path]) -> str:
    return ", ".join(str(f) for f in files[:3]) + (" ..." if len(files) > 3 else "")


def _listed(problems: list[str]) -> str:
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join(problems[:SHOWN] + more)


def _on_cpu(sharding) -> bool:
    """Whether arrays placed so live in the memory of this machine, on one device."""
    if sharding is None:
        return jax.default_backend() == "cpu"
    return len(sharding.device_set) == 1 and next(iter(sharding.device_set)).platform == "cpu"


def _empty(shape, dtype, sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


def _empty_stack(layers: int, part: trees.Tree, shardings) -> trees.Tree:
    """Room for so many of the arrays of `part`, on a leading axis."""
    if shardings is None:
        shardings = jax.tree.map(lambda _: None, part)
    leaves, structure = jax.tree.flatten(part)
    places = structure.flatten_up_to(shardings)
    return structure.unflatten(
        [_empty((layers, *x.shape), x.dtype, s) for x, s in zip(leaves, places, strict=True)]
    )


def _of_layer(sharding):
    """The sharding of a stacked array, or of a quantised one's values, less its leading axis."""
    sharding = sharding.qvalue if quantization.is_quantised(sharding) else sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    return jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:])
    )
