"""Streaming safetensors into a parameter tree: one tensor at a time, memory-mapped, no torch."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dopsd_jax.core import trees
from dopsd_jax.weights.names import Rule, Slot, WeightsError, resolve

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a model directory: all shards of its index, or the single file.

    Raises:
        WeightsError: No such directory, no safetensors in it, only pickles, a missing shard, or
            several files without an index.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory}: expected a directory of model weights, found none")
    indices = sorted(directory.glob("*.safetensors.index.json"))
    files = sorted(directory.glob("*.safetensors"))
    if len(indices) == 1:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
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
        raise WeightsError(f"{path}: truncated or not a safetensors file ({e})") from e


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
        stand_in = np.broadcast_to(np.zeros((), np.int8), found[tensor])
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

    Host memory above the final arrays is at most the largest single tensor (plus its cast):
    stacked parameters are allocated on the device and filled layer by layer.

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
        WeightsError: Every tensor without a rule, parameter without a tensor, wrong shape and
            unreadable file, together.
    """
    flat_shapes = trees.flatten(shapes)
    flat_shardings = trees.flatten(shardings) if shardings is not None else {}
    files = [Path(f) for f in files]
    with contextlib.ExitStack() as stack:
        handles, found, problems = {}, {}, []
        for file in files:
            try:
                handle = stack.enter_context(open_safetensors(file))
            except WeightsError as e:
                problems.append(str(e))
                continue
            for tensor in handle.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                if tensor in found:
                    problems.append(f"{tensor}: stands in more than one file")
                found[tensor] = tuple(handle.get_slice(tensor).get_shape())
                handles[tensor] = handle
        if problems:
            raise WeightsError("\n".join(problems))
        slots, problems = resolve(table, found)
        problems += _check_slots(slots, found, flat_shapes)
        if problems:
            where = ", ".join(str(f) for f in files[:3]) + (" ..." if len(files) > 3 else "")
            listed = "\n  ".join(problems[:40])
            more = f"\n  ... and {len(problems) - 40} more" if len(problems) > 40 else ""
            raise WeightsError(
                f"{where}: {len(problems)} tensors or parameters do not fit the network:\n  "
                f"{listed}{more}"
            )
        flat: dict[str, jax.Array] = {}
        for done, (tensor, slot) in enumerate(slots.items()):
            value = slot.transform.to_flax(handles[tensor].get_tensor(tensor))
            target = np.dtype(dtype) if dtype is not None else value.dtype
            sharding = flat_shardings.get(slot.name)
            if slot.layer is None:
                flat[slot.name] = jax.device_put(np.ascontiguousarray(value, target), sharding)
            else:
                if slot.name not in flat:
                    flat[slot.name] = _empty(flat_shapes[slot.name].shape, target, sharding)
                part = np.ascontiguousarray(value, target)
                flat[slot.name] = _write(flat[slot.name], slot.layer, _like(part, sharding))
            del value
            if report is not None:
                report(done + 1, len(slots))
    return trees.unflatten(flat)


def _empty(shape, dtype, sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


def _like(part: np.ndarray, sharding) -> jax.Array:
    """Places one layer with the stacked array's sharding less its leading axis."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return jax.device_put(part, sharding)
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
    return jax.device_put(part, jax.sharding.NamedSharding(sharding.mesh, spec))
