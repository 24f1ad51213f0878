"""Quantised weights beside the model that they were made of, so that a start need not make them.

    DIR/.quantised/transformer_int8_bfloat16_<content>.safetensors

The file's name tells part, kind, dtype of what is not quantised, and the content of the part's own
files, see weights/fingerprints.py: other weights are other files, and old ones may be deleted. A
quantised parameter NAME is two tensors, NAME:values and NAME:scale; two values of four bits share
a byte, the first in its lower half.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dopsd_jax.core import trees
from dopsd_jax.core.log import log
from dopsd_jax.core.sharding import place
from dopsd_jax.models import quantization
from dopsd_jax.weights.mapped import Stored, map_safetensors
from dopsd_jax.weights.names import WeightsError

FOLDER = ".quantised"  # hidden, so that it is no part of the model's own fingerprint
VALUES, SCALE = ":values", ":scale"
LAYOUT = "1"  # of the tensors in a file


def file_of(directory: Path, part: str, kind: str, dtype, content: str) -> Path:
    """Where the quantised weights of a part of a model lie.

    Args:
        directory: Of the model.
        part: Such as transformer.
        kind: A key of quantization.KINDS.
        dtype: Of scales and of what is not quantised.
        content: Fingerprint of the part.
    """
    kind = quantization.stored_as(kind)
    name = f"{part}_{kind}_{jnp.dtype(dtype).name}_{content}_{LAYOUT}.safetensors"
    return directory / FOLDER / name


def cached(
    file: Path, shapes: trees.Tree, shardings: trees.Tree | None, make: Callable[[], trees.Tree]
) -> trees.Tree:
    """The weights of a file, or what `make` gives, which is then written there.

    Args:
        file: See `file_of`.
        shapes: As `quantization.quantised_shapes` has them.
        shardings: Tree of shardings like it; None is the default device.
        make: Reads and quantises the model's own files.

    Raises:
        WeightsError: A file that is damaged or holds something else, or a directory that cannot be
            written to; the latter before anything is made.
    """
    if file.is_file():
        log.info("reading %s, quantised before, %.2f GB", file, file.stat().st_size / 1e9)
        return read(file, shapes, shardings)
    try:
        file.parent.mkdir(exist_ok=True)
        reachable = os.access(file.parent, os.W_OK)
    except OSError:
        reachable = False
    if not reachable:
        raise WeightsError(
            f"{file.parent}: expected a folder that quantised weights can be written to, beside "
            "the model; leave out cache_quantised, or copy the model to where you may write"
        )
    tree = make()
    leaves = jax.tree.leaves(tree)
    if not all(x.is_fully_addressable for x in leaves):
        log.info("%s: not written, the weights are spread over several machines", file)
    elif jax.process_index() == 0:
        write(file, tree)
        log.info("%s: written, %.2f GB; the next start reads it", file, file.stat().st_size / 1e9)
    return tree


def write(file: Path, tree: trees.Tree) -> None:
    """Writes the parameters to a safetensors file, which appears when it is whole."""
    tensors: dict[str, np.ndarray] = {}
    for name, x in trees.flatten(tree).items():
        if quantization.is_quantised(x):
            tensors[name + VALUES] = _packed(np.asarray(x.qvalue))
            tensors[name + SCALE] = np.asarray(x.scale)
        else:
            tensors[name] = np.asarray(x)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def read(file: Path, shapes: trees.Tree, shardings: trees.Tree | None) -> trees.Tree:
    """The parameters of a file that `write` wrote; see `cached`."""
    stored = map_safetensors(file)
    places = trees.flatten(shardings) if shardings is not None else {}
    flat = {}
    for name, shape in trees.flatten(shapes).items():
        where = places.get(name)
        if not quantization.is_quantised(shape):
            flat[name] = place(_take(file, stored, name, shape), where)
            continue
        parts = shape.replace(
            qvalue=_take(file, stored, name + VALUES, shape.qvalue),
            scale=_take(file, stored, name + SCALE, shape.scale),
        )
        flat[name] = place(parts, where)
    if stored:
        raise WeightsError(_unfit(file, f"also holds {', '.join(sorted(stored)[:3])}"))
    return trees.unflatten(flat)


def _take(file: Path, stored: dict[str, Stored], name: str, shape) -> np.ndarray:
    """A tensor by name, taken out of `stored`, checked to be of a shape and dtype."""
    if name not in stored:
        raise WeightsError(_unfit(file, f"lacks {name}"))
    value = _unpacked(stored.pop(name).view(), shape)
    if (value.shape, value.dtype) != (shape.shape, np.dtype(shape.dtype)):
        raise WeightsError(_unfit(
            file, f"has {name} as {value.dtype}{list(value.shape)}, expected "
            f"{np.dtype(shape.dtype)}{list(shape.shape)}"
        ))
    return value


def _unfit(file: Path, what: str) -> str:
    return f"{file}: {what}; delete it, and the next start writes it again"


def _packed(values: np.ndarray) -> np.ndarray:
    """Values of four bits, two in a byte if their columns are even; others as they are."""
    if values.dtype != jnp.uint4:
        return values
    if values.shape[-1] % 2:
        return values.astype(np.uint8)
    low, high = (values.astype(np.uint8)[..., i::2] for i in (0, 1))
    return low | high << 4


def _unpacked(values: np.ndarray, shape) -> np.ndarray:
    """The inverse of `_packed` where a shape has values of four bits."""
    if shape.dtype != jnp.uint4 or values.dtype != np.uint8:
        return values
    if shape.shape[-1] % 2:
        return values.astype(jnp.uint4)
    both = np.stack([values & 15, values >> 4], -1)
    return both.reshape(*values.shape[:-1], -1).astype(jnp.uint4)
