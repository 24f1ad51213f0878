"""Multi-head attention in one place: every network calls `attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dopsd_jax.core.checks import check_shapes


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """Scaled dot-product attention with float32 softmax; G = K / J query heads share a key head.

    Args:
        q: [B, N, K, d].
        k: [B, M, J, d], J divides K; query head i uses key head i // (K / J).
        v: [B, M, J, d].
        mask: bool, True = may attend; [B, M] over keys or [B, N, M]; None attends everywhere.
            A query that may attend nowhere returns the mean of v, never NaN.

    Returns:
        [B, N, K, d] in v's dtype.
    """
    dims = check_shapes("attention", q=(q, "B N K d"), k=(k, "B M J d"), v=(v, "B M J d"))
    if dims["K"] % dims["J"]:
        raise ValueError(f"attention: {dims['J']} key heads do not divide {dims['K']} query heads")
    q = q.reshape(*q.shape[:2], dims["J"], dims["K"] // dims["J"], dims["d"])
    logits = jnp.einsum("BNJGd,BMJd->BJGNM", q, k, preferred_element_type=jnp.float32)
    logits = logits * dims["d"] ** -0.5
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 2 else mask
        # Finite, so that a fully masked row stays finite in forward and backward.
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("BJGNM,BMJd->BNJGd", weights, v)
    return out.reshape(*out.shape[:2], dims["K"], dims["d"])
