"""Stage 1 of the mini model: the VAE, on pictures of the world and on recoloured ones."""

from __future__ import annotations

from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.core import trees
from dopsd_jax.core.log import log
from dopsd_jax.data.images import to_uint8
from dopsd_jax.method.train_step import Method, init_state, make_train_step
from dopsd_jax.mini import data as data_lib
from dopsd_jax.mini import encoding, ending
from dopsd_jax.mini import rows as rows_lib
from dopsd_jax.mini.labels import WORLD
from dopsd_jax.mini.model import fresh, save_models
from dopsd_jax.models.vae import STACKS, Vae
from dopsd_jax.run import loop, previews
from dopsd_jax.weights.pipeline import load_pipeline
from dopsd_jax.weights.shapes import vae_shapes

LOG_VARIANCE = (-30.0, 20.0)  # as diffusers clamps it
MEASURED = 512  # held-back pictures, at most


@flax.struct.dataclass
class VaeBatch:
    """images: float32 [B, H, W, 3] in [-1, 1]; noise: float32 [B, h, w, C]."""

    images: jax.Array
    noise: jax.Array


def vae_objective(vae: Vae, kl_weight: float):
    """Mean squared and absolute error of a noisy reconstruction, plus a KL term.

    Metrics: `loss`, `psnr` (dB, of pixels in [0, 1]), `kl` (nats per latent).
    """
    def loss(params, batch: VaeBatch):
        moments = vae.apply({"params": params}, batch.images, method="encode")
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        log_variance = jnp.clip(log_variance, *LOG_VARIANCE)
        z = mean + jnp.exp(0.5 * log_variance) * batch.noise
        error = vae.apply({"params": params}, z, method="decode") - batch.images
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
        square = jnp.mean(jnp.square(error))
        value = square + 0.1 * jnp.mean(jnp.abs(error)) + kl_weight * kl
        return value, {"psnr": -10 * jnp.log10(square / 4), "kl": kl}

    def objective(student, teacher, base, batch: VaeBatch):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(student, batch)
        return grads, {"loss": value} | metrics

    return objective


def prepare(config: ConfigDict, workdir: Path) -> tuple[loop.Task, object]:
    """The task, and what to do with its last state: write the pipeline with the VAE in it."""
    scenes, pairs = (data_lib.read_part(config.data, kind) for kind in ("scenes", "pairs"))
    parts = [jnp.asarray(part.pixels) for part in (pairs, scenes)]
    test = data_lib.read_part(config.data, "judge_test")
    pipe = load_pipeline(config.model, dtype="float32", parts=())
    vae, size = pipe.vae, scenes.pixels.shape[1]
    optimizer = ending.optimizer_of(config, STACKS)
    optimizer = ending.with_end(optimizer, config)
    state = init_state(
        jax.tree.map(jnp.asarray, fresh(vae_shapes(vae), jax.random.key(config.seed))), optimizer,
        jax.random.key_data(jax.random.key(config.seed + 1)),
    )
    method = Method(
        trainable="full", teacher="ema", ema_decay=config.ema_decay, ema_warmup=True
    )
    def draw_batch(parts, key) -> VaeBatch:
        for_part, for_index, for_noise = jax.random.split(key, 3)
        most = jnp.asarray([len(part) for part in parts])[:, None]
        index = jax.random.randint(for_index, (2, config.batch_size), 0, most)
        of_pairs = jax.random.uniform(for_part, (config.batch_size, 1, 1, 1)) < 0.5
        pixels = jnp.where(of_pairs, *(part[i] for part, i in zip(parts, index, strict=True)))
        side = size // vae.config.factor
        noise = jax.random.normal(
            for_noise, (config.batch_size, side, side, vae.config.latent_channels)
        )
        return VaeBatch(data_lib.to_float(pixels), noise)

    step_fn = rows_lib.step_that_draws(
        make_train_step(method, optimizer, vae_objective(vae, config.kl_weight)), draw_batch
    )
    shown = data_lib.to_float(np.concatenate([test.pixels[:8], pairs.pixels[:8]]))
    rebuild = jax.jit(lambda p, x: vae.apply({"params": p}, x))
    measured = min(MEASURED, len(test) // len(shown) * len(shown))
    many, styles = data_lib.to_float(test.pixels[:measured]), test.styles[:measured]
    held_out = np.isin(np.asarray(WORLD.styles)[styles], WORLD.held_out_styles)

    def preview(step: int, state, metrics) -> None:
        rebuilt = np.asarray(rebuild(state.teacher, shown))
        parts = many.reshape(-1, len(shown), *shown.shape[1:])
        error = np.concatenate([
            np.mean(np.square(np.asarray(rebuild(state.teacher, part)) - part), (1, 2, 3))
            for part in parts
        ])
        psnr = -10 * np.log10(error / 4)
        log.info("step %d: PSNR of held-back pictures %.2f dB, of held-out styles %.2f dB",
                 step, psnr[~held_out].mean(), psnr[held_out].mean())
        worst = {name: round(float(psnr[styles == i].mean()), 1)
                 for i, name in enumerate(WORLD.styles)}
        log.info("by style: %s", worst)
        grid = previews.grid([("picture", to_uint8(shown)), ("rebuilt", to_uint8(rebuilt))])
        previews.save(workdir / "samples" / f"step_{step:06d}.png", grid)
        metrics.image(step, "rebuilt", grid)

    def finish(state) -> None:
        """Scales the latents to mean 0 and variance 1, as a denoiser wants them."""
        params = jax.tree.map(np.asarray, state.teacher)
        z = encoding.encoded(vae, params, scenes.pixels[:2000]).astype(np.float32)
        raw = z / vae.config.scaling_factor + vae.config.shift_factor
        scale = {"shift_factor": float(raw.mean()), "scaling_factor": float(1 / raw.std())}
        log.info("latents: %s", scale)
        save_models(config.model, config.vlm, workdir, {"vae": params}, vae_scale=scale)

    log.info("VAE: %s parameters", f"{trees.count(state.student):,}")
    return loop.Task(
        state, lambda state, parts: step_fn(state, None, parts), lambda step, rng: parts, preview
    ), finish
