"""Kernels of frozen linear layers in 8 or 4 bits, with a scale for every tile of a column.

A quantised kernel is a `qwix.QArray` in the array's place in the parameter tree, with the stack's
axis in front. Products dequantise one layer at a time, in forward and backward pass alike, so that
a whole network in floats never exists. Adapters, activations and gradients stay what they are.

Source: qwix, https://github.com/google/qwix; nf4: https://arxiv.org/abs/2305.14314, appendix E.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import qwix

from dopsd_jax.core import trees
from dopsd_jax.core.trees import Tree

# Name -> (what qwix calls it, how many inputs share a scale; None: the whole column). Tiles lose
# less, but a TPU dequantises them apart from the product: on v5e that costs 30% of it, and whole
# columns nothing. Four bits need them.
KINDS: dict[str, tuple[Any, int | None]] = {
    "int8": (jnp.int8, None),
    "w8a8": (jnp.int8, None),
    "fp8": (jnp.float8_e4m3fn, None),
    "nf4": ("nf4", 64),
}
W8A8 = "w8a8"
AS_DTYPE = "dtype"  # of base_dtype and encoder_dtype: not quantised
BASE_DTYPES = (AS_DTYPE, *KINDS)
ENCODER_DTYPES = tuple(kind for kind in BASE_DTYPES if kind != W8A8)  # run once: no time to gain
SMALLEST_TILE = 8  # of a column that no larger tile divides, the whole has one scale
Kernel = jax.Array | qwix.QArray


@flax.struct.dataclass
class IntegerProducts(qwix.QArray):
    """A kernel of int8 whose products are those of integers: their inputs are rounded too."""


def is_quantised(kernel: Any) -> bool:
    return isinstance(kernel, qwix.QArray)


def names(shapes: Tree) -> set[str]:
    """Which parameters of a network are quantised: kernels of layers that are stacked.

    What is left, such as embeddings of times, the first and the last linear, and all norms, is
    small, and its errors are seen most.

    Args:
        shapes: Parameters or their shapes.
    """
    return {
        name for name, x in trees.flatten(shapes).items()
        if name.rpartition("/")[2] == "kernel" and len(x.shape) == 3
    }


def quantise(kernel: jax.Array, kind: str, dtype: Any = jnp.bfloat16) -> qwix.QArray:
    """A kernel [.., in, out] of floats in a key of KINDS, rounded to the nearest.

    Args:
        kernel: Floats.
        kind: A key of KINDS.
        dtype: Of the scales and of what it dequantises to.
    """
    qtype, tile = KINDS[kind]
    axis = kernel.ndim - 2
    whole = kernel.shape[axis]
    tile = math.gcd(whole, tile or whole)
    tile = whole if tile < SMALLEST_TILE else tile
    others = [i for i in range(kernel.ndim) if i != axis]
    # In float32: a quotient of bfloat16 would be off by more than half a step of int8.
    array = qwix.quantize(
        kernel.astype(jnp.float32), qtype, channelwise_axes=others, tiled_axes={axis: tile},
        scale_dtype=dtype,
    )
    return IntegerProducts(**vars(array)) if kind == W8A8 else array


def quantise_tree(params: Tree, kind: str, dtype: Any = jnp.bfloat16) -> Tree:
    """The parameters with the kernels of `names` quantised; works on shapes under jax.eval_shape.

    Args:
        params: Floats.
        kind: A key of KINDS.
        dtype: See `quantise`.
    """
    which = names(params)
    return trees.map_named(lambda n, x: quantise(x, kind, dtype) if n in which else x, params)


def quantised_as(name: str, value: str, choices: Sequence[str] = BASE_DTYPES) -> str:
    """A key of KINDS, or "" for AS_DTYPE; raises ValueError for what is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
    return "" if value == AS_DTYPE else value


def stored_as(kind: str) -> str:
    """The first key of KINDS under which the same values and scales are kept."""
    return next(other for other in KINDS if KINDS[other] == KINDS[kind])


def quantised_shapes(shapes: Tree, quantise: str, dtype: Any) -> Tree:
    """Shapes of parameters as they are kept: floats of a dtype, kernels perhaps quantised.

    Args:
        shapes: Of a network's parameters in floats.
        quantise: A key of KINDS, or "" for none.
        dtype: Of floats and of scales; None leaves them as they are.
    """
    if dtype is not None:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    if not quantise:
        return shapes
    return jax.eval_shape(lambda x: quantise_tree(x, quantise, dtype), shapes)


def floats(kernel: Kernel, dtype: Any) -> jax.Array:
    """What a kernel stands for, quantised or not, in a dtype."""
    if not is_quantised(kernel):
        return kernel.astype(dtype)
    if kernel.qtype == "nf4":
        return _floats_of_nf4(kernel).astype(dtype)
    return qwix.dequantize(kernel).astype(dtype)


def _floats_of_nf4(kernel: qwix.QArray) -> jax.Array:
    """`qwix.dequantize`, bit for bit, but by choices between the 16 levels, bit after bit: a TPU
    looks values up in a table one by one, for 3.6 times the cycles of a product on v5e."""
    with jax.ensure_compile_time_eval():
        every = qwix.QArray(jnp.arange(16, dtype=jnp.uint4), jnp.ones(16), qtype="nf4")
        levels = list(qwix.dequantize(every).astype(kernel.dtype))
    index = kernel.qvalue.astype(jnp.int32)
    for bit in range(4):
        is_set = (index >> bit) & 1 == 1
        levels = [jnp.where(is_set, high, low)
                  for low, high in zip(levels[::2], levels[1::2], strict=True)]
    tile = kernel.shape[-2] // kernel.scale.shape[-2]
    return levels[0] * jnp.repeat(kernel.scale, tile, axis=-2)


def product(x: jax.Array, kernel: Kernel) -> jax.Array:
    """x [N, in] times a kernel [in, out]; of a quantised one nothing is differentiated.

    Its gradient dequantises the kernel again: kept between the passes, the floats of all layers
    would take more memory than the quantisation saves, whatever the policy of rematerialisation.
    """
    return _product(x, kernel) if is_quantised(kernel) else x @ kernel


@jax.custom_vjp
def _product(x: jax.Array, kernel: qwix.QArray) -> jax.Array:
    if isinstance(kernel, IntegerProducts):
        rounded = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=(0,))
        return qwix.dot_general(rounded, kernel, (((1,), (0,)), ((), ()))).astype(x.dtype)
    return x @ floats(kernel, x.dtype)


_product.defvjp(
    lambda x, kernel: (_product(x, kernel), kernel),
    lambda kernel, g: (g @ floats(kernel, g.dtype).T, None),
)
