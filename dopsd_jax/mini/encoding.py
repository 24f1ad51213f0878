"""Captions, reference pictures and pictures of the mini world, as the networks read them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core import trees
from dopsd_jax.core.files import new_sibling
from dopsd_jax.core.log import log
from dopsd_jax.data import prompts
from dopsd_jax.mini.data import to_float
from dopsd_jax.models.denoiser import Context
from dopsd_jax.models.qwen3_vl import multimodal_features
from dopsd_jax.weights.fingerprints import fingerprint
from dopsd_jax.weights.pipeline import Pipeline, VisionLanguage

TEXT_TOKENS = 32     # padded captions; with the template the longest has 26
PAIR_TOKENS = 64     # padded captions with 16 tokens of a picture before them
IMAGE_TOKENS = 16
PATCH, MERGE, TEMPORAL = 8, 2, 2  # of the vision tower, see mini/model.py


def caption_ids(tokenizer, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [N, 32], mask bool [N, 32]; an empty caption is the template alone."""
    return prompts.encode_prompts(
        tokenizer, captions, TEXT_TOKENS, enable_thinking=True, allow_empty=True
    )


def pair_ids(tokenizer, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [N, 64], mask bool [N, 64], of captions with a picture before them."""
    return prompts.encode_image_prompts(tokenizer, captions, IMAGE_TOKENS, PAIR_TOKENS)


def patches(pixels: jax.Array) -> jax.Array:
    """uint8 [B, 64, 64, 3] -> the vision tower's patches, float32 [B, 64, 384].

    As `prompts.image_patches` cuts a picture that need not be resized, but on the device.
    """
    B, H, W, _ = pixels.shape
    x = to_float(pixels).transpose(0, 3, 1, 2)
    down, across = H // (MERGE * PATCH), W // (MERGE * PATCH)
    x = x.reshape(B, 3, down, MERGE, PATCH, across, MERGE, PATCH)
    x = x.transpose(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    x = jnp.broadcast_to(x, (*x.shape[:6], TEMPORAL, *x.shape[7:]))
    return x.reshape(B, down * across * MERGE**2, -1)


def text_features(pipe: Pipeline, params: trees.Tree, ids, mask) -> Context:
    """Context of captions, differentiable in the text encoder's parameters."""
    features = pipe.text_encoder.apply({"params": params}, ids, mask)
    return Context(jnp.where(mask[..., None], features, 0), mask)


def pair_features(
    pipe: Pipeline, vl: VisionLanguage, text: trees.Tree, vision: trees.Tree, ids, mask, patches
) -> Context:
    """Context of captions with pictures, differentiable in both encoders' parameters."""
    side = int(patches.shape[1] ** 0.5)
    features = multimodal_features(
        pipe.text_encoder, {"params": text}, vl.vision, {"params": vision}, ids=ids, mask=mask,
        patches=patches, grid=(side, side), image_token_id=vl.config.image_token_id,
        mrope_section=vl.config.mrope_section, rope_theta=vl.config.rope_theta,
        tap=pipe.text_encoder.depth,
    )
    return Context(jnp.where(mask[..., None], features, 0), mask)


@partial(jax.jit, static_argnums=0)
def _encode(vae, params, pixels):
    return vae.apply({"params": params}, to_float(pixels), method="encode_mode").astype(jnp.float16)


def encoded(
    vae, params: trees.Tree, pixels: np.ndarray, *, batch: int = 125, name: str = ""
) -> np.ndarray:
    """Normalised latents of pictures, uint8 [N, H, W, 3] -> float16 [N, h, w, C].

    Args:
        vae: The network.
        params: Its parameters.
        pixels: uint8 [N, H, W, 3].
        batch: Pictures at a time; the last ones are repeated to fill up, so one program will do.
        name: For the log.
    """
    result = []
    for i in range(0, len(pixels), batch):
        rows = np.minimum(np.arange(i, i + batch), len(pixels) - 1)
        result.append(np.asarray(_encode(vae, params, pixels[rows]))[: len(pixels) - i])
        if name and i // batch % 80 == 79:
            log.info("%s of %d of %d pictures", name, i + batch, len(pixels))
    return np.concatenate(result)


def latents(
    pipe: Pipeline, world: str | Path, kind: str, pixels: np.ndarray, *, name: str = "latents"
) -> np.ndarray:
    """Normalised latents of a part's pictures, float16 [N, h, w, C]; kept beside them.

    Args:
        pipe: With VAE.
        world, kind: Where the part lies.
        pixels: uint8 [N, H, W, 3].
        name: Of the file, before what identifies the VAE.
    """
    file = Path(world) / kind / f"{name}_{fingerprint(pipe.directory / 'vae')}.npy"
    if file.is_file():
        return np.load(file, mmap_mode="r", allow_pickle=False)
    result = encoded(pipe.vae, pipe.vae_params, pixels, name=f"{kind}: {name}")
    with new_sibling(file) as temporary:
        with temporary.open("wb") as f:
            np.save(f, result)
        os.replace(temporary, file)
    return np.load(file, mmap_mode="r", allow_pickle=False)
