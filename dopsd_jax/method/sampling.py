"""Drawing with a network: the start, the few denoiser calls and the decoder, each under jit."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.data.images import to_uint8
from dopsd_jax.method import flow, rollout
from dopsd_jax.method.guidance import guided
from dopsd_jax.models.denoiser import Denoiser
from dopsd_jax.models.vae import Vae
from dopsd_jax.weights.pipeline import Pipeline


@functools.partial(jax.jit, static_argnums=0)
def sample_trajectory(denoiser: Denoiser, variables, noise, ctx, sigmas):
    """`rollout.trajectory` under jit: the sample [B, h, w, C] and its x0 [S, B, h, w, C].

    `ctx` may be a `guidance.GuidedContext`.
    """
    return rollout.trajectory(variables, noise, ctx, sigmas, velocity=guided(denoiser.velocity))


def sample(denoiser: Denoiser, variables, noise, ctx, sigmas: np.ndarray) -> jax.Array:
    """The sample of `sample_trajectory` alone, by one program for every number of steps."""
    filled = np.zeros(flow.MAX_STEPS + 1, np.float32)
    filled[: len(sigmas)] = sigmas
    return _sample(denoiser, variables, noise, ctx, filled, len(sigmas) - 1)


@functools.partial(jax.jit, static_argnums=0)
def _sample(denoiser: Denoiser, variables, noise, ctx, sigmas, num_steps):
    def step(s, x):
        v = guided(denoiser.velocity)(variables, x, sigmas[s], ctx)
        return flow.euler_step(x, v, sigmas[s], sigmas[s + 1])

    return jax.lax.fori_loop(0, num_steps, step, noise.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _decode(vae: Vae, params, latents):
    # One image at a time: the decoder's activations are far larger than its output.
    return jax.lax.map(
        lambda z: vae.apply({"params": params}, z[None], method="decode_normalised")[0], latents
    )


def decode(pipe: Pipeline, latents: jax.Array) -> np.ndarray:
    """Normalised latents [B, h, w, C] -> pixels uint8 [B, H, W, 3].

    Raises:
        ValueError: Pictures that are not finite, by number, which in `generate` is the prompt's.
    """
    images = np.asarray(_decode(pipe.vae, pipe.vae_params, latents), np.float32)
    if bad := [i for i, image in enumerate(images) if not np.isfinite(image).all()]:
        raise ValueError(
            f"{len(bad)} of {len(images)} pictures hold NaN or infinity, those of the prompts "
            f"{bad} (counted from 0); the weights or the LoRA are damaged or overflow, try "
            "dtype=float32"
        )
    return to_uint8(images)


def draw_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> jax.Array:
    """One start per seed, float32 [B, h, w, C]: a picture depends on its own seed alone."""
    return jnp.stack([jax.random.normal(jax.random.key(s), shape, jnp.float32) for s in seeds])
