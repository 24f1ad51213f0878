"""Rotary position embeddings: tables in float64 NumPy at trace time, rotation in float32."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core import sharding


def axis_tables(
    axes_dims: Sequence[int], axes_lens: Sequence[int], theta: float
) -> list[np.ndarray]:
    """Angle tables, one per position axis, float64 [length, dim / 2]."""
    tables = []
    for dim, length in zip(axes_dims, axes_lens, strict=True):
        freqs = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        tables.append(np.arange(length, dtype=np.float64)[:, None] * freqs)
    return tables


def image_ids(rows: int, cols: int, t: int = 0) -> np.ndarray:
    """Positions (t, h, w, l) of an image's tokens in raster order: int32 [rows cols, 4].

    t is 0 for the image that is drawn and 10, 20, .. for references.
    """
    h, w = np.divmod(np.arange(rows * cols, dtype=np.int32), np.int32(cols))
    return np.stack([np.full_like(h, t), h, w, np.zeros_like(h)], axis=-1)


def gather_cos_sin(tables: Sequence[np.ndarray], ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Looks positions up, axis by axis.

    Args:
        tables: From `axis_tables`, one per axis, in the order of the last axis of `ids`.
        ids: int32 [B, N, axes]; every id must be below its table's length.

    Returns:
        cos, sin: float32 [B, N, d] with d the sum of the axes' dims: an angle's for both numbers
            of its pair, the sine of the first negated, as `rotate_interleaved` takes them.
    """
    cos = [_both(np.cos(t), 1)[ids[..., i]] for i, t in enumerate(tables)]
    sin = [_both(np.sin(t), -1)[ids[..., i]] for i, t in enumerate(tables)]
    return jnp.concatenate(cos, axis=-1), jnp.concatenate(sin, axis=-1)


def _both(table: np.ndarray, first: int) -> jax.Array:
    """Every column twice, the first times `first`."""
    return jnp.asarray(np.stack([first * table, table], -1).reshape(len(table), -1), jnp.float32)


def rotate_interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (2j, 2j+1) of x [B, N, K, d]; cos, sin [B, N, d] of `gather_cos_sin`.

    float32 inside.
    """
    swapped = _swap_by_product(x) if sharding.platform() == "tpu" else _swap(x)
    rotated = x.astype(jnp.float32) * cos[:, :, None] + swapped * sin[:, :, None]
    return rotated.astype(x.dtype)


def _swap(x: jax.Array) -> jax.Array:
    """Neighbours (2j, 2j+1) of the last axis change places; float32."""
    return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape).astype(jnp.float32)


def _swap_by_product(x: jax.Array) -> jax.Array:
    """`_swap` as a product with a permutation matrix, which is exact.

    Cutting the last axis into pairs costs a TPU more than all products of an attention layer.
    """
    d = x.shape[-1]
    swap = np.zeros((d, d), np.float32)
    swap[np.arange(d) ^ 1, np.arange(d)] = 1
    return jnp.matmul(
        x, jnp.asarray(swap, x.dtype), precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def rotate_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (j, j + d/2) of x [B, N, K, d] by angles [B, N, d / 2], in cos's dtype."""
    dtype = x.dtype
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(dtype)
