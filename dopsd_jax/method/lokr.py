"""LoKr: the change of a kernel [in, out] is a Kronecker product w1 kron w2, float32.

w1 [i1, o1] is small; w2 [i2, o2] is whole, or w2_down [i2, r] w2_up [r, o2] where that saves half.

Source: LyCORIS `LokrModule`, whose factors are these transposed.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dopsd_jax.core import trees
from dopsd_jax.core.trees import Tree


def factorization(size: int, factor: int) -> tuple[int, int]:
    """The two factors of a layer's side, the smaller one first.

    The smaller is `factor` if that divides; else, and for -1, the largest divisor up to it, or up
    to the root. LyCORIS and PEFT split in the same way.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = next(m for m in range(most, 0, -1) if size % m == 0)
    return first, size // first


def init(rng: jax.Array, shapes: Tree, names: list[str], rank: int, factor: int) -> Tree:
    """A LoKr that changes nothing: uniform random but for w2, or w2_down, which is 0.

    Args:
        rng: PRNG key.
        shapes: Parameter tree (arrays or ShapeDtypeStruct).
        names: Of the kernels, see `lora.match_targets`.
        rank: r >= 1; w2 is whole where r is at least half of its longer side.
        factor: See `factorization`.

    Source: LyCORIS, whose first weights these are.
    """
    flat, made = trees.flatten(shapes), {}
    for key, name in zip(jax.random.split(rng, len(names)), names, strict=True):
        *stack, size_in, size_out = flat[name].shape
        (in_1, in_2), (out_1, out_2) = (factorization(s, factor) for s in (size_in, size_out))
        path = name.removesuffix("/kernel")
        keys = jax.random.split(key)
        made[f"{path}/w1"] = _uniform(keys[0], (*stack, in_1, out_1), in_1)
        if rank < max(in_2, out_2) / 2:
            made[f"{path}/w2_down"] = jnp.zeros((*stack, in_2, rank), jnp.float32)
            made[f"{path}/w2_up"] = _uniform(keys[1], (*stack, rank, out_2), rank)
        else:
            made[f"{path}/w2"] = jnp.zeros((*stack, in_2, out_2), jnp.float32)
    return trees.unflatten(made)


def _uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
