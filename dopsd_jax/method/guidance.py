"""Classifier-free guidance: away from what a negative prompt would draw, for every sampler."""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

from dopsd_jax.core.checks import is_number
from dopsd_jax.core.log import log
from dopsd_jax.method.rollout import Velocity
from dopsd_jax.models.denoiser import Context
from dopsd_jax.weights.pipeline import Pipeline

NAMES = ("guidance", "negative")


@flax.struct.dataclass
class GuidedContext:
    """A positive context, a negative one, and how far to go from the one to the other.

    Attributes:
        positive, negative: Contexts of B rows; their padded lengths may differ.
        scale: float32 scalar; 1: no guidance.
    """

    positive: Context
    negative: Context
    scale: jax.Array


def pad_context(ctx: Context, length: int) -> Context:
    """The same context with its text padded to `length`, which changes no prediction."""
    more = length - ctx.text.shape[1]
    return ctx.replace(
        text=jnp.pad(ctx.text, ((0, 0), (0, more), (0, 0))),
        text_mask=jnp.pad(ctx.text_mask, ((0, 0), (0, more))),
    )


def guided(velocity: Velocity) -> Velocity:
    """The velocity negative + scale (positive - negative), for a `GuidedContext`.

    Both halves run as one batch of 2 B rows. A `Context` alone is asked for as it is.
    """
    def v(variables, x, sigma, ctx: GuidedContext | Context):
        if not isinstance(ctx, GuidedContext):
            return velocity(variables, x, sigma, ctx)
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


def with_guidance(ctx: Context, negative: Context, scale: float) -> GuidedContext:
    """A context led away from a negative one, which sees the same references.

    Args:
        ctx: Of B rows.
        negative: The text of one row, for all of them.
        scale: See `scale_of`.
    """
    rows = len(ctx.text)
    text, mask = (jnp.repeat(jnp.asarray(x), rows, 0) for x in (negative.text, negative.text_mask))
    return GuidedContext(ctx, ctx.replace(text=text, text_mask=mask), jnp.float32(scale))


def scale_of(pipe: Pipeline, guidance: float) -> float:
    """The `GuidedContext.scale` of what users of the model's own pipeline call guidance_scale."""
    return guidance + 1 - pipe.family.unguided


def check_guidance(
    pipe: Pipeline, guidance: float, negative: str, names: tuple[str, str] = NAMES
) -> None:
    """Raises ValueError for a guidance that is none of the model's, or a negative without any.

    `names` are what the two are called where they were given.
    """
    least = pipe.family.unguided
    if not is_number(guidance) or (guidance != 0 and not guidance > least):
        above = f"above {least:g}, as this model's guidance_scale in diffusers"
        raise ValueError(
            f"{names[0]}: expected 0 for none or a number {above}, got {guidance!r:.40}"
        )
    if negative and not guidance:
        raise ValueError(
            f"{names[1]}: expected none with {names[0]} = 0, got {negative!r:.40}; give {names[0]} "
            "too, such as 4"
        )


def advise(pipe: Pipeline, guidance: float) -> None:
    """Warns, once a process, where a model and a guidance do not go together."""
    _advise(str(pipe.directory), pipe.distilled, bool(guidance))


@functools.cache
def _advise(model: str, distilled: bool, led: bool) -> None:
    if distilled and led:
        log.warning(
            "%s: this model is step-distilled, guidance is built into its weights; more of it "
            "mostly spoils colours and contrast, and doubles the time. Leave it out, unless a "
            "LoRA undoes the distillation", model,
        )
    elif not distilled and not led:
        log.warning(
            "%s: this model is not step-distilled: it is made for guidance (about 4) and many "
            "steps (about 30 or more); without them its pictures are vague", model,
        )
