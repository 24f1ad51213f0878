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
from dopsd_jax.method.train_step import Method, init_state, make_optimizer, make_train_step
from dopsd_jax.mini import data as data_lib
from dopsd_jax.mini.model import fresh, save_models
from dopsd_jax.models.vae import STACKS, Vae
from dopsd_jax.run import loop, previews
from dopsd_jax.weights.pipeline import load_pipeline, vae_shapes

LOG_VARIANCE = (-30.0, 20.0)  # as diffusers clamps it
FULL_EVERY = 4  # whole pictures every so many updates, crops of a quarter of them otherwise


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


def crops(pixels: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """A random window of every picture: [B, H, W, 3] -> [B, size, size, 3]."""
    tops, lefts = rng.integers(0, pixels.shape[1] - size + 1, (2, len(pixels)))
    return np.stack([
        p[t : t + size, x : x + size] for p, t, x in zip(pixels, tops, lefts, strict=True)
    ])


def prepare(config: ConfigDict, workdir: Path) -> tuple[loop.Task, object]:
    """The task, and what to do with its last state: write the pipeline with the VAE in it."""
    scenes, pairs = (data_lib.read_part(config.data, kind) for kind in ("scenes", "pairs"))
    test = data_lib.read_part(config.data, "judge_test")
    pipe = load_pipeline(config.model, dtype="float32", parts=())
    vae, size = pipe.vae, scenes.pixels.shape[1]
    optimizer = make_optimizer(
        **config.optimizer.to_dict(), num_train_steps=config.num_train_steps, stacks=STACKS
    )
    state = init_state(
        jax.tree.map(jnp.asarray, fresh(vae_shapes(vae), jax.random.key(config.seed))), optimizer,
        jax.random.key_data(jax.random.key(config.seed + 1)),
    )
    method = Method(
        trainable="full", teacher="ema", ema_decay=config.ema_decay, ema_warmup=True
    )
    step_fn = jax.jit(
        make_train_step(method, optimizer, vae_objective(vae, config.kl_weight)), donate_argnums=0
    )

    def make_batch(step: int, rng) -> VaeBatch:
        draw = np.random.default_rng([config.seed, step])
        part = pairs if draw.uniform() < 0.5 else scenes
        whole = step % FULL_EVERY == 0
        count, side = (config.batch_size // 4, size) if whole else (config.batch_size, size // 2)
        pixels = part.pixels[np.sort(draw.choice(len(part), count, replace=False))]
        images = data_lib.to_float(crops(pixels, draw, side))
        latent = (count, side // vae.config.factor, side // vae.config.factor,
                  vae.config.latent_channels)
        noise = draw.standard_normal(latent, np.float32)
        return VaeBatch(jnp.asarray(images), jnp.asarray(noise))

    shown = data_lib.to_float(np.concatenate([test.pixels[:8], pairs.pixels[:8]]))
    rebuild = jax.jit(lambda p, x: vae.apply({"params": p}, x))

    def preview(step: int, state, metrics) -> None:
        rebuilt = np.asarray(rebuild(state.teacher, shown))
        many = data_lib.to_float(test.pixels[:128])
        error = np.mean(np.square(np.asarray(rebuild(state.teacher, many)) - many), (1, 2, 3))
        held_out = test.styles[:128] >= test.styles.max() - 1
        psnr = -10 * np.log10(error / 4)
        log.info("step %d: PSNR of held-back pictures %.2f dB, of held-out styles %.2f dB",
                 step, psnr[~held_out].mean(), psnr[held_out].mean())
        grid = previews.grid([("picture", to_uint8(shown)), ("rebuilt", to_uint8(rebuilt))])
        previews.save(workdir / "samples" / f"step_{step:06d}.png", grid)
        metrics.image(step, "rebuilt", grid)

    def finish(state) -> None:
        """Scales the latents to mean 0 and variance 1, as a denoiser wants them."""
        params = jax.tree.map(np.asarray, state.teacher)
        encode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode_mode"))
        z = np.concatenate([
            np.asarray(encode(params, data_lib.to_float(scenes.pixels[i : i + 100])))
            for i in range(0, min(2000, len(scenes)), 100)
        ])
        raw = z / vae.config.scaling_factor + vae.config.shift_factor
        scale = {"shift_factor": float(raw.mean()), "scaling_factor": float(1 / raw.std())}
        log.info("latents: %s", scale)
        save_models(config.model, config.vlm, workdir, {"vae": params}, vae_scale=scale)

    log.info("VAE: %s parameters", f"{trees.count(state.student):,}")
    wrapped = lambda state, batch: step_fn(state, None, batch)  # noqa: E731
    return loop.Task(state, wrapped, make_batch, preview), finish
