"""Many pictures of the mini model at once, for measuring: captions with known answers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core import trees
from dopsd_jax.method import flow, sampling
from dopsd_jax.method.guidance import with_guidance
from dopsd_jax.mini import encoding, world
from dopsd_jax.mini.labels import Labels
from dopsd_jax.models.denoiser import Context
from dopsd_jax.weights.pipeline import Pipeline, VisionLanguage

PAIRS_AT_ONCE = 125
STREAM = 9  # of the random numbers of test captions; training has its own


@dataclasses.dataclass(frozen=True)
class Cases:
    """Captions, and what a picture of each must show.

    Attributes:
        captions: N captions.
        styles: int [N], index into the labels' styles.
        concepts: bool [N, labels' concepts].
        seeds: int [N], of the noise each picture starts from.
    """

    captions: list[str]
    styles: np.ndarray
    concepts: np.ndarray
    seeds: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)


def draw_cases(
    labels: Labels, count: int, *, seed: int = 0, styles: Sequence[str] = (),
    concepts: Sequence[str] = (), **shares,
) -> Cases:
    """Captions as the world writes them, none of which was written for training.

    Args:
        labels: What the model that draws them knows, and the judge that looks.
        count: N.
        seed: Of all of them.
        styles, concepts: What to choose from; (): all that training showed.
        **shares: See `world.draw_scene`.
    """
    scenes = [
        world.draw_scene(
            np.random.default_rng([seed, STREAM, i]), styles=styles or labels.trained_styles,
            concepts=concepts or labels.trained_concepts, **shares,
        ) for i in range(count)
    ]
    return Cases(
        [s.caption for s in scenes],
        np.asarray([labels.styles.index(s.style) for s in scenes]),
        np.stack([labels.shown([t.concept for t in s.things]) for s in scenes]),
        np.arange(count) + 1_000_000 * (seed + 1),
    )


def read_cases(labels: Labels, captions: Sequence[str], *, seed: int = 0) -> Cases:
    """Captions as a user writes them: the words that are labels tell what must be shown.

    Raises:
        ValueError: Captions without exactly one of the styles and one or two of the things.
    """
    words = [set(re.findall(r"[a-z]+", c.lower())) for c in captions]
    styles = [[i for i, s in enumerate(labels.styles) if s in w] for w in words]
    concepts = np.stack([[c in w or world.plural(c) in w for c in labels.concepts] for w in words])
    wrong = [
        c for c, s, k in zip(captions, styles, concepts.sum(1), strict=True)
        if len(s) != 1 or k not in (1, 2)
    ]
    if wrong:
        raise ValueError(
            f"prompts: expected one style ({', '.join(labels.styles)}) and one or two things "
            f"({', '.join(labels.concepts)}) in each, got {wrong}"
        )
    return Cases(
        list(captions), np.asarray(styles)[:, 0], concepts,
        np.arange(len(captions)) + 1_000_000 * (seed + 1),
    )


def draw(
    pipe: Pipeline, variables: trees.Tree, ctx: Context, seeds: Sequence[int], *, num_steps: int,
    guidance: float = 1.0, side: int = world.SIZE, batch: int = 100,
) -> np.ndarray:
    """Pictures of contexts, uint8 [N, 64, 64, 3].

    Args:
        pipe: With text encoder and VAE.
        variables: Of the transformer, {"params": ..} and {"lora": ..} if any.
        ctx: Contexts of N rows.
        seeds: Of each row's noise.
        num_steps: Denoiser calls (twice as many network calls with guidance).
        guidance: Scale; 1 is none.
        side: Pixels.
        batch: Rows at a time.
    """
    sigmas = jnp.asarray(flow.sigmas_shifted(num_steps, pipe.shift))
    shape = pipe.denoiser.latent_shape(side, side)
    ids, mask = encoding.caption_ids(pipe.tokenizer, [""])
    empty = encoding.text_features(pipe, pipe.text_params, ids, mask)
    pictures = []
    for i in range(0, len(seeds), batch):
        rows = [min(j, len(seeds) - 1) for j in range(i, i + batch)]  # one shape for every batch
        part = jax.tree.map(lambda x, rows=rows: jnp.asarray(x[np.asarray(rows)]), ctx)
        noise = sampling.draw_noise([int(seeds[j]) for j in rows], shape)
        led = part if guidance == 1.0 else with_guidance(part, empty, guidance)
        x, _ = sampling.sample_trajectory(pipe.denoiser, variables, noise, led, sigmas)
        pictures.append(sampling.decode(pipe, x)[: len(seeds) - i])
    return np.concatenate(pictures)


@partial(jax.jit, static_argnums=0)
def _text(encoder, params, ids, mask):
    features = encoder.apply({"params": params}, ids, mask)
    return jnp.where(mask[..., None], features, 0)


def pair_contexts(
    pipe: Pipeline, vl: VisionLanguage, captions: Sequence[str], shown: np.ndarray
) -> Context:
    """Contexts of captions with a picture each, uint8 [N, 64, 64, 3]; [N, 64, D] as NumPy."""
    ids, mask = encoding.pair_ids(vl.tokenizer, captions)
    inputs = ids, mask, np.asarray(encoding.patches(shown))
    features = jax.jit(lambda *a: encoding.pair_features(pipe, vl, *a))
    parts = [
        features(pipe.text_params, vl.params, *(a[i : i + PAIRS_AT_ONCE] for a in inputs))
        for i in range(0, len(captions), PAIRS_AT_ONCE)
    ]
    return Context(*(np.concatenate([np.asarray(getattr(p, n)) for p in parts])
                     for n in ("text", "text_mask")))


def text_contexts(pipe: Pipeline, captions: Sequence[str]) -> Context:
    """Contexts of captions, [N, 32, D] as NumPy."""
    ids, mask = encoding.caption_ids(pipe.tokenizer, captions)
    return Context(np.asarray(_text(pipe.text_encoder, pipe.text_params, ids, mask)), mask)
