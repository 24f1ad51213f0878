"""Stage 3 of the mini model: the transformer distilled to few steps, guidance baked in."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dopsd_jax import loop
from dopsd_jax.distill import DistillBatch, distill_loss_and_grad, segments
from dopsd_jax.guidance import pad_context
from dopsd_jax.mini import encoding
from dopsd_jax.mini.base_stage import Gallery, Rows, World, context, load
from dopsd_jax.mini.model import save_models
from dopsd_jax.train_step import Method, init_state, make_optimizer, make_train_step


def prepare(config: ConfigDict, workdir: Path):
    """The task, and what to do with its last state: write the pipeline with the new transformer."""
    pipe, vl = load(config)
    world = World(config, pipe, vl)
    # The encoders stay as they are; the teacher is the transformer as it came.
    encoders = {"text_encoder": pipe.text_params, "vision": vl.params}
    base = {"transformer": pipe.params} | encoders
    optimizer = make_optimizer(**config.optimizer.to_dict(), num_train_steps=config.num_train_steps)
    state = init_state(
        jax.tree.map(jnp.copy, pipe.params), optimizer,
        jax.random.key_data(jax.random.key(config.seed + 1)),
    )
    sigmas = segments(config.num_steps, config.substeps, pipe.shift)

    def objective(student, average, base, rows: tuple[Rows, Rows]):
        text, pair = (pad_context(context(pipe, vl, base, r), encoding.PAIR_TOKENS) for r in rows)
        ctx = jax.tree.map(lambda *x: jnp.concatenate(x), text, pair)
        empty = encoding.text_features(pipe, base["text_encoder"], *world.empty_ids)
        noise, latents = (
            jnp.concatenate([getattr(r, name) for r in rows]) for name in ("noise", "latents")
        )
        batch = DistillBatch(
            noise, latents, from_data=jnp.arange(len(noise)) % 3 == 0, ctx=ctx,
            empty=jax.tree.map(lambda x: jnp.repeat(x, len(noise), 0), empty),
        )
        return distill_loss_and_grad(
            student, base["transformer"], batch, sigmas, velocity=pipe.denoiser.velocity,
            assemble=lambda tree: {"params": tree}, guidance=config.guidance,
        )

    method = Method(trainable="full", teacher="ema", ema_decay=config.ema_decay)
    step_fn = jax.jit(make_train_step(method, optimizer, objective), donate_argnums=0)
    pair_rows = config.batch_size // 3

    def make_batch(step: int, rng) -> tuple[Rows, Rows]:
        draw = np.random.default_rng([config.seed, step])
        rows = world.rows(draw, config.batch_size - pair_rows)
        return jax.tree.map(jnp.asarray, (rows, world.pair_rows(draw, pair_rows)))

    gallery = Gallery(config, workdir, pipe, vl)

    def preview(step: int, state, metrics) -> None:
        params = {"transformer": state.teacher} | encoders
        gallery.save(step, params, metrics, ((config.num_steps, 1.0), (2 * config.num_steps, 1.0)))

    def finish(state) -> None:
        trained = jax.tree.map(np.asarray, state.teacher)
        save_models(config.model, config.vlm, workdir, {"transformer": trained})

    return loop.Task(
        state, lambda state, batch: step_fn(state, base, batch), make_batch, preview,
    ), finish
