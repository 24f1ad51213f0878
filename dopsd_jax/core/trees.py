"""Pytrees of nested dicts, by slash-joined names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dicts -> {"a/b/c": leaf}, in sorted order. Empty subtrees vanish."""
    flat = {}

    def visit(node, path):
        if isinstance(node, dict):
            for key in sorted(node):
                visit(node[key], (*path, key))
        else:
            flat["/".join(path)] = node

    visit(tree, ())
    return flat


def unflatten(flat: dict[str, Any]) -> Tree:
    """{"a/b/c": leaf} -> nested dicts; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        node = tree
        *parents, last = name.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map_named(f: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Maps `f(name, leaf)` over nested dicts."""
    return unflatten({name: f(name, leaf) for name, leaf in flatten(tree).items()})


def count(tree: Tree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def num_bytes(tree: Tree) -> int:
    """Bytes of a tree of arrays or shapes."""
    bits = sum(
        int(np.prod(x.shape)) * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(tree)
    )
    return bits // 8  # of four-bit integers two share a byte


def cast_floats(tree: Tree, dtype) -> Tree:
    """Casts floating leaves to `dtype`, leaves the rest alone."""
    def cast(x):
        return x.astype(dtype) if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) else x

    return jax.tree.map(cast, tree)


def round_like(tree: Tree, like: Tree, rng: jax.Array) -> Tree:
    """A float32 tree in the dtypes of `like`; what becomes bfloat16 is rounded at random.

    Up or down with odds such that the mean is right. Averages and moments need it: their change
    per update is below bfloat16's resolution, and rounded to the nearest they would never move.

    Args:
        tree: Arrays.
        like: Tree of the same structure.
        rng: PRNG key; another one for every call.
    """
    def cast(i, x, want):
        if want.dtype != jnp.bfloat16 or x.dtype != jnp.float32:
            return x.astype(want.dtype)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        low = jax.random.bits(jax.random.fold_in(rng, i), x.shape, jnp.uint16)
        cut = jax.lax.bitcast_convert_type(
            (bits + low) & jnp.uint32(0xFFFF0000), jnp.float32
        )
        return jnp.where(jnp.isfinite(x), cut, x).astype(want.dtype)

    leaves, structure = jax.tree.flatten(tree)
    likes = jax.tree.leaves(like)
    return jax.tree.unflatten(
        structure, [cast(i, x, y) for i, (x, y) in enumerate(zip(leaves, likes, strict=True))]
    )
