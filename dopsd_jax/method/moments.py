"""AdamW's averages in fewer bits between two updates; inside an update they are float32.

`rounded` keeps them in bfloat16, `quantised` in int8 through qwix.

In 8 bits neither average may be rounded linearly: squared gradients of one block differ by many
powers of ten, and one that is rounded to 0 turns its next update into a leap. So the root of the
first average is quantised, with its sign, and of the second, which is of squares, the fourth root:
steps of both are then fine for small gradients and coarse for large ones, and both vanish at the
same ones, where gradients are 1e-5 of a block's largest. Rounded to the nearest, which needs no
noise: what all of a block has in common is in its scale, which is float32.

Source of the idea, with blocks of 256: https://arxiv.org/abs/2110.02861, whose own map of 8 bits is
another one. Quantisation itself is qwix's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import qwix

from dopsd_jax.core import sharding
from dopsd_jax.core.trees import Tree, cast_floats, round_like
from dopsd_jax.models.quantization import is_quantised

BLOCK = 256  # values that share a scale, at most
SMALLEST_BLOCK = 64  # arrays that only smaller blocks divide stay float32,
SMALLEST_SIZE = 4096  # and so do these: their scales would weigh more, and they take no memory
# qwix scales a block's largest value to 127.5, where int8 ends at 127: kept from one update to the
# next it would shrink by 0.4% each time.
SIGNED = f"absmax,{127.5 / 127}"
POSITIVE = "minmax"  # from 0 to the largest, in all 256 steps


class KeptIn(NamedTuple):
    """State of an optimizer whose floats are stored in fewer bits, and its count of updates."""

    count: jax.Array
    inner: Any


def rounded(
    dtype: jnp.dtype, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The optimizer, all floats of whose state are kept in `dtype`."""
    def init(params):
        return KeptIn(jnp.zeros((), jnp.int32), cast_floats(optimizer.init(params), dtype))

    def update(grads, state, params=None):
        # Computed in float32, then rounded at random: with b2 = 0.999 an update changes a moment by
        # a thousandth, which bfloat16, rounded to the nearest, would lose every time.
        wide = cast_floats(state.inner, jnp.float32)
        updates, inner = optimizer.update(grads, wide, params)
        rng = jax.random.fold_in(jax.random.key(0), state.count)
        return updates, KeptIn(state.count + 1, round_like(inner, state.inner, rng))

    return optax.GradientTransformation(init, update)


def quantised(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, whose averages by optax's Adam are kept as `qwix.QArray` in int8."""
    def init(params):
        return _of_adam(_pack, optimizer.init(params))

    def update(grads, state, params=None):
        updates, new = optimizer.update(grads, _of_adam(_unpack, state), params)
        return updates, _of_adam(_pack, new)

    return optax.GradientTransformation(init, update)


def _of_adam(f: Callable[[optax.ScaleByAdamState], Any], state: Any) -> Any:
    """Applies f to the states of Adam inside a state, the rest stays."""
    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    return jax.tree.map(lambda node: f(node) if is_adam(node) else node, state, is_leaf=is_adam)


def _pack(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
    def arrays(tree: Tree, kind: str) -> Tree:
        def one(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return _quantise(x, kind, sharding.fsdp_axis(name, x.ndim))

        return jax.tree_util.tree_map_with_path(one, tree)

    return state._replace(mu=arrays(state.mu, SIGNED), nu=arrays(state.nu, POSITIVE))


def _unpack(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
    def floats(tree: Tree) -> Tree:
        return jax.tree.map(_dequantise, tree, is_leaf=is_quantised)

    return state._replace(mu=floats(state.mu), nu=floats(state.nu))


def blocks(shape: tuple[int, ...], split: int | None = None) -> dict[int, int] | None:
    """Axis -> how many along it share a scale; None for an array that stays float32.

    Args:
        shape: Of the array.
        split: The axis that the mesh splits. Blocks lie along the other of the last two, or they
            would straddle chips, and XLA would gather the whole array.
    """
    if math.prod(shape) < SMALLEST_SIZE:
        return None
    axes = [axis for axis in (len(shape) - 1, len(shape) - 2) if axis >= 0]
    found: dict[int, int] = {}
    size = 1
    for axis in sorted(axes, key=lambda axis: axis == split):
        if size < SMALLEST_BLOCK:
            found[axis] = math.gcd(shape[axis], BLOCK // size)
            size *= found[axis]
    return found if size >= SMALLEST_BLOCK else None


def _quantise(x: jax.Array, kind: str, split: int | None = None) -> qwix.QArray | jax.Array:
    tiles = blocks(x.shape, split)
    if tiles is None:
        return x
    x = jnp.sign(x) * jnp.sqrt(jnp.abs(x)) if kind == SIGNED else jnp.sqrt(jnp.sqrt(x))
    others = [axis for axis in range(x.ndim) if axis not in tiles]
    return qwix.quantize(
        x, jnp.int8, channelwise_axes=others, tiled_axes=tiles, calibration_method=kind
    )


def _dequantise(x: qwix.QArray | jax.Array) -> jax.Array:
    if not is_quantised(x):
        return x
    root = qwix.dequantize(x)
    # Only the second average has a zero point: it has no negative values.
    if x.zero_point is None:
        return root * jnp.abs(root)
    return jnp.square(jnp.square(root))
