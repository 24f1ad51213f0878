"""Wraps a velocity with classifier-free guidance, so that every sampler works with it."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from dopsd_jax.method.rollout import Velocity
from dopsd_jax.models.denoiser import Context


@flax.struct.dataclass
class GuidedContext:
    """A positive context, a negative one, and the guidance scale (1: no guidance).

    Attributes:
        positive, negative: Contexts of B rows; their padded lengths may differ.
        scale: float32 scalar.
    """

    positive: Context
    negative: Context
    scale: jax.Array


def pad_context(ctx: Context, length: int) -> Context:
    """The same context with its text padded to `length`, which changes no prediction."""
    more = length - ctx.text.shape[1]
    return Context(
        jnp.pad(ctx.text, ((0, 0), (0, more), (0, 0))), jnp.pad(ctx.text_mask, ((0, 0), (0, more)))
    )


def guided(velocity: Velocity) -> Velocity:
    """The velocity negative + scale (positive - negative), for a `GuidedContext`.

    Both halves run as one batch of 2 B rows.
    """
    def v(variables, x, sigma, ctx: GuidedContext):
        length = max(ctx.positive.text.shape[1], ctx.negative.text.shape[1])
        both = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), pad_context(ctx.positive, length),
            pad_context(ctx.negative, length),
        )
        sigma = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), x.shape[:1])
        out = velocity(variables, jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma]), both)
        positive, negative = jnp.split(out, 2)
        return negative + ctx.scale * (positive - negative)

    return v
