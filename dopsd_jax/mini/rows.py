"""Rows of the mini world for training: everything is on the device, batches are drawn there.

So small a network trains faster than a host reads, tokenises and cuts pictures; and a batch that is
a function of arrays and a key needs no word from the host at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core import trees
from dopsd_jax.method.train_step import TrainState
from dopsd_jax.mini import data as data_lib
from dopsd_jax.mini import encoding
from dopsd_jax.weights.pipeline import Pipeline, VisionLanguage

WORDLESS = "a picture"  # caption of a pair that leaves all telling to the picture


@flax.struct.dataclass
class Kind:
    """All rows of one kind: captions with their pictures, or with a reference picture besides.

    Attributes:
        latents: float16 [N, h, w, C].
        ids, mask: [N, L], the captions.
        placement: float16 [N, tokens, 7], see world.placement.
        other_ids, other_mask: [1, L], the caption that takes the place of a dropped one.
        references: uint8 [N, 64, 64, 3], or None.
        reference_latents: float16 [N, h, w, C], or None.
    """

    latents: jax.Array
    ids: jax.Array
    mask: jax.Array
    placement: jax.Array
    other_ids: jax.Array
    other_mask: jax.Array
    references: jax.Array | None = None
    reference_latents: jax.Array | None = None


@flax.struct.dataclass
class Rows:
    """Rows of one kind of context.

    Attributes:
        latents, noise: float32 [B, h, w, C].
        sigma: float32 [B].
        ids, mask: [B, L].
        placement: float32 [B, tokens, 7], see world.placement.
        patches: float32 [B, n, d] of the reference picture, or None.
        picture: float32 [B, image tokens, numbers], its latents, or None.
    """

    latents: jax.Array
    noise: jax.Array
    sigma: jax.Array
    ids: jax.Array
    mask: jax.Array
    placement: jax.Array
    patches: jax.Array | None = None
    picture: jax.Array | None = None


def scenes(data: str | Path, pipe: Pipeline) -> Kind:
    """The world's captioned scenes; a dropped caption is the empty one."""
    part = data_lib.read_part(data, "scenes")
    return Kind(
        encoding.latents(pipe, data, "scenes", part.pixels),
        *encoding.caption_ids(pipe.tokenizer, part.captions), _by_token(part.placements),
        *encoding.caption_ids(pipe.tokenizer, [""]),
    )


def pairs(data: str | Path, pipe: Pipeline, vl: VisionLanguage) -> Kind:
    """The world's pairs; a dropped caption tells nothing, so that the picture has to tell all."""
    part = data_lib.read_part(data, "pairs")
    return Kind(
        encoding.latents(pipe, data, "pairs", part.pixels),
        *encoding.pair_ids(vl.tokenizer, part.captions), _by_token(part.placements),
        *encoding.pair_ids(vl.tokenizer, [WORDLESS]),
        references=np.asarray(part.references),
        reference_latents=encoding.latents(
            pipe, data, "pairs", part.references, name="reference_latents"
        ),
    )


def _by_token(placements: np.ndarray) -> np.ndarray:
    return placements.reshape(len(placements), -1, placements.shape[-1])


def draw(kind: Kind, key: jax.Array, count: int, *, drop: float = 0.0) -> Rows:
    """Rows at random, each with a noise and a noise level of its own; a function of the key.

    Args:
        kind: Where they come from.
        key: PRNG key.
        count: B.
        drop: Share of captions that are replaced.
    """
    for_index, for_noise, for_sigma, for_drop = jax.random.split(key, 4)
    index = jax.random.randint(for_index, (count,), 0, len(kind.latents))
    latents = kind.latents[index].astype(jnp.float32)
    dropped = jax.random.uniform(for_drop, (count, 1)) < drop
    rows = Rows(
        latents, jax.random.normal(for_noise, latents.shape), draw_sigma(for_sigma, count),
        jnp.where(dropped, kind.other_ids, kind.ids[index]),
        jnp.where(dropped, kind.other_mask, kind.mask[index]),
        kind.placement[index].astype(jnp.float32),
    )
    if kind.references is None:
        return rows
    shown = kind.reference_latents[index].astype(jnp.float32)
    return rows.replace(
        patches=encoding.patches(kind.references[index]),
        picture=by_token(shown, math.isqrt(encoding.IMAGE_TOKENS)),
    )


def draw_sigma(key: jax.Array, count: int) -> jax.Array:
    """Noise levels to train on: logit-normal around 0.65, one in ten uniform; float32 [count]."""
    for_normal, for_uniform, for_choice = jax.random.split(key, 3)
    sigma = jax.nn.sigmoid(0.6 + 1.2 * jax.random.normal(for_normal, (count,)))
    uniform = jax.random.uniform(for_uniform, (count,))
    sigma = jnp.where(jax.random.uniform(for_choice, (count,)) < 0.1, uniform, sigma)
    return jnp.clip(sigma, 1e-3, 1.0)


def by_token(latents: jax.Array, side: int) -> jax.Array:
    """Latents [B, h, w, C] cut into side x side pieces, rows first: [B, side * side, numbers]."""
    B, h, w, C = latents.shape
    cut = latents.reshape(B, side, h // side, side, w // side, C).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(B, side * side, -1)


def step_that_draws(
    train_step: Callable[[TrainState, trees.Tree, Any], tuple[TrainState, dict]],
    draw_batch: Callable[[Any, jax.Array], Any],
) -> Callable[[TrainState, trees.Tree, Any], tuple[TrainState, dict]]:
    """A jitted train step that draws its batch: (state, base, data) -> state, metrics.

    Args:
        train_step: From `make_train_step`.
        draw_batch: (data, key) -> batch; the key is the run's, folded with the step.
    """
    def step(state: TrainState, base: trees.Tree, data):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        return train_step(state, base, draw_batch(data, key))

    return jax.jit(step, donate_argnums=0)
