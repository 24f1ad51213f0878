"""Quantised weights beside the model that they were made of, so that a start need not make them.

    DIR/.quantised/transformer_int8_bfloat16_<key>/NAME.safetensors

The folder's name tells the part, the kind, the dtype of what is not quantised, and the model's own
files of that part, see `fingerprints.of_files`: other weights are another folder, and old ones may
be deleted. There is a file for every parameter, so that one at a time is in host memory. A
quantised one is two tensors, values and scale; two values of four bits share a byte, the first in
its lower half.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dopsd_jax.core import trees
from dopsd_jax.core.log import log
from dopsd_jax.core.sharding import place
from dopsd_jax.models import quantization
from dopsd_jax.weights.mapped import Stored, map_safetensors
from dopsd_jax.weights.names import WeightsError

FOLDER = ".quantised"  # hidden, so that it is no part of the model's own fingerprint
FLOATS, VALUES, SCALE = "floats", "values", "scale"
LAYOUT = "2"  # of the files
PARTIAL = ".partial"
DAY = 86400.0  # seconds, after which what a killed process left is removed


def folder_of(directory: Path, part: str, kind: str, dtype, key: str) -> Path:
    """Where the quantised weights of a part of a model lie.

    Args:
        directory: Of the model.
        part: Such as transformer.
        kind: A key of quantization.KINDS.
        dtype: Of scales and of what is not quantised.
        key: Of the part's own files.
    """
    kind = quantization.stored_as(kind)
    return directory / FOLDER / f"{part}_{kind}_{jnp.dtype(dtype).name}_{key}_{LAYOUT}"


def cached(
    folder: Path, shapes: trees.Tree, shardings: trees.Tree | None, make: Callable[[], trees.Tree]
) -> trees.Tree:
    """The weights of a folder, or what `make` gives, which is then written there.

    What cannot be written is a warning: the weights are there all the same. A run of several
    processes reads and writes nothing, since each of them may see another disk.

    Args:
        folder: See `folder_of`.
        shapes: As `quantization.quantised_shapes` has them.
        shardings: Tree of shardings like it; None is the default device.
        make: Reads and quantises the model's own files.

    Raises:
        WeightsError: A folder that is damaged or holds something else.
    """
    if jax.process_count() > 1:
        log.warning("%s: neither read nor written by a run of several processes", folder)
        return make()
    if folder.is_dir():
        log.info("reading %s, quantised before", folder)
        return read(folder, shapes, shardings)
    tree = make()
    try:
        write(folder, tree)
    except (OSError, SafetensorError) as e:
        log.warning("%s: could not be written (%s); the next start quantises again", folder, e)
    else:
        log.info("%s: written; the next start reads it", folder)
    return tree


def write(folder: Path, tree: trees.Tree) -> None:
    """Writes the parameters to a folder, which appears when it is whole.

    Raises:
        OSError, SafetensorError: It cannot be written; nothing is left of it then.
    """
    folder.parent.mkdir(exist_ok=True)
    for old in folder.parent.glob(f"*{PARTIAL}"):
        if old.stat().st_mtime < time.time() - DAY:
            shutil.rmtree(old, ignore_errors=True)
    # Not by the process' number: in a container the next process may have the same.
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    partial.mkdir()
    mode = partial.stat().st_mode & 0o666  # the library's own is for the owner alone
    try:
        for name, x in trees.flatten(tree).items():
            if quantization.is_quantised(x):
                tensors = {VALUES: _packed(np.asarray(x.qvalue)), SCALE: np.asarray(x.scale)}
            else:
                tensors = {FLOATS: np.asarray(x)}
            file = _file(partial, name)
            save_file(tensors, file)
            file.chmod(mode)
        if not folder.is_dir():  # else another process was first
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(folder: Path, shapes: trees.Tree, shardings: trees.Tree | None) -> trees.Tree:
    """The parameters of a folder that `write` wrote; see `cached`."""
    places = trees.flatten(shardings) if shardings is not None else {}
    flat = {}
    for name, shape in trees.flatten(shapes).items():
        file = _file(folder, name)
        try:
            stored = map_safetensors(file)
        except WeightsError as e:
            raise WeightsError(f"{e}; {_advice(folder)}") from e
        if quantization.is_quantised(shape):
            value = shape.replace(
                qvalue=_take(file, stored, VALUES, shape.qvalue),
                scale=_take(file, stored, SCALE, shape.scale),
            )
        else:
            value = _take(file, stored, FLOATS, shape)
        flat[name] = jax.block_until_ready(place(value, places.get(name)))
        del value
        for tensor in stored.values():
            tensor.forget()
    return trees.unflatten(flat)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '.')}.safetensors"


def _take(file: Path, stored: dict[str, Stored], name: str, shape) -> np.ndarray:
    """A tensor by name, checked to be of a shape and dtype."""
    if name not in stored:
        raise WeightsError(f"{file}: lacks {name}; {_advice(file.parent)}")
    value = _unpacked(stored[name].view(), shape)
    if (value.shape, value.dtype) != (shape.shape, np.dtype(shape.dtype)):
        raise WeightsError(
            f"{file}: has {name} as {value.dtype}{list(value.shape)}, expected "
            f"{np.dtype(shape.dtype)}{list(shape.shape)}; {_advice(file.parent)}"
        )
    return value


def _advice(folder: Path) -> str:
    return f"delete {folder}, and the next start writes it again"


def _packed(values: np.ndarray) -> np.ndarray:
    """[.., in, out] of four bits, two in a byte if columns are even; others as they are."""
    if values.dtype != jnp.uint4:
        return values
    if values.shape[-1] % 2:
        return values.view(np.uint8)
    out = np.empty((*values.shape[:-1], values.shape[-1] // 2), np.uint8)
    for layer, packed in zip(values.view(np.uint8), out, strict=True):  # one at a time
        np.bitwise_or(layer[..., ::2], layer[..., 1::2] << 4, out=packed)
    return out


def _unpacked(values: np.ndarray, shape) -> np.ndarray:
    """The inverse of `_packed` where a shape has values of four bits."""
    if shape.dtype != jnp.uint4 or values.dtype != np.uint8:
        return values
    if shape.shape[-1] % 2:
        return values.view(jnp.uint4)
    out = np.empty((*values.shape[:-1], 2 * values.shape[-1]), np.uint8)
    for packed, layer in zip(values, out, strict=True):
        layer[..., ::2], layer[..., 1::2] = packed & 15, packed >> 4
    return out.view(jnp.uint4)
