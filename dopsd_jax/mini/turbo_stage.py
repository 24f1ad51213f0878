"""Stage 3 of the mini model: the transformer distilled to few steps, guidance baked in."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dopsd_jax.core import trees
from dopsd_jax.core.log import log
from dopsd_jax.method import lora
from dopsd_jax.method.train_step import Method, init_state, make_optimizer, make_train_step
from dopsd_jax.mini import encoding
from dopsd_jax.mini.base_stage import Gallery, Rows, World, context, load
from dopsd_jax.mini.distill import CRITIC, STUDENT, DistillBatch, distill_loss_and_grad, segments
from dopsd_jax.mini.guidance import pad_context
from dopsd_jax.mini.model import save_models
from dopsd_jax.run import loop, loras
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.pipeline import Pipeline

TARGETS = (r".*/(attention|feed_forward)/.*/kernel", r".*/adaLN_modulation/kernel")
UNDO = "undistilled_lora.safetensors"  # what turns the distilled transformer back into the base


def _optimizer(config: ConfigDict, rate: float) -> optax.GradientTransformation:
    """The config's optimizer, with its learning rate times `rate`."""
    settings = config.optimizer.to_dict()
    settings["learning_rate"] *= rate
    return make_optimizer(**settings, num_train_steps=config.num_train_steps)


def earlier_student(undo: str | Path, pipe: Pipeline, fresh: trees.Tree) -> trees.Tree:
    """The student's LoRA of an earlier run, from the UNDO that it left.

    Args:
        undo: That file.
        pipe: The pipeline that is distilled.
        fresh: A LoRA of the wanted shapes.

    Raises:
        ValueError: It adapts other linears, or with another rank.
    """
    tree, scale = loras.read_lora(undo, pipe)
    found, wanted = ({n: x.shape for n, x in trees.flatten(t).items()} for t in (tree, fresh))
    if found != wanted:
        differ = sorted(n for n in found | wanted if found.get(n) != wanted.get(n))
        raise ValueError(
            f"{undo}: expected the student of an earlier run of this stage; {len(differ)} arrays "
            f"differ, such as {differ[0]}: expected {wanted.get(differ[0])}, got "
            f"{found.get(differ[0])}"
        )
    return lora.scaled(tree, -scale)


def prepare(config: ConfigDict, workdir: Path):
    """The task, and what to do with its last state: fold the LoRA into the pipeline's transformer.

    The distilled model is base + LoRA, so the same LoRA with its sign turned is a small file that
    gives the undistilled model back, for whoever wants to compare.
    """
    pipe, vl = load(config)
    world = World(config.data, pipe, vl)
    encoders = {"text_encoder": pipe.text_params, "vision": vl.params}  # stay as they are
    method = Method(
        trainable="lora", lora_scale=1.0, teacher="ema", ema_decay=config.ema_decay,
        ema_warmup=True,
    )
    rng = jax.random.key(config.seed)
    rates = {STUDENT: 1.0} | ({CRITIC: config.critic_rate} if config.matching else {})
    trained = {
        name: lora.init(jax.random.fold_in(rng, i), pipe.params, TARGETS, config.rank)
        for i, name in ((1, STUDENT), (3, CRITIC)) if name in rates
    }
    if config.student:
        trained[STUDENT] = earlier_student(config.student, pipe, trained[STUDENT])
    optimizer = optax.partition(
        {name: _optimizer(config, rate) for name, rate in rates.items()},
        {name: name for name in rates},
    )
    state = init_state(trained, optimizer, jax.random.key_data(jax.random.fold_in(rng, 2)))
    log.info("LoRA: %s parameters", f"{trees.count(state.student[STUDENT]):,}")
    sigmas = segments(config.num_steps, config.substeps, pipe.shift)

    def objective(trained, average, base, batch: tuple[Rows, Rows, jax.Array]):
        *rows, step = batch
        text, pair = (
            pad_context(context(pipe, vl, encoders, r), encoding.PAIR_TOKENS) for r in rows
        )
        ctx = jax.tree.map(lambda *x: jnp.concatenate(x), text, pair)
        empty = encoding.text_features(pipe, encoders["text_encoder"], *world.empty_ids)
        noise, latents = (
            jnp.concatenate([getattr(r, name) for r in rows]) for name in ("noise", "latents")
        )
        batch = DistillBatch(
            noise, latents, from_data=jnp.arange(len(noise)) % 3 == 0, ctx=ctx,
            empty=jax.tree.map(lambda x: jnp.repeat(x, len(noise), 0), empty),
            key=jax.random.fold_in(rng, step),
        )
        return distill_loss_and_grad(
            trained, base, batch, sigmas, velocity=pipe.denoiser.velocity,
            assemble=method.assemble, guidance=config.guidance, matching=config.matching,
            last_regression=config.last_regression,
        )

    step_fn = jax.jit(make_train_step(method, optimizer, objective), donate_argnums=0)
    pair_rows = config.batch_size // 3

    def make_batch(step: int, rng) -> tuple[Rows, Rows, jax.Array]:
        draw = np.random.default_rng([config.seed, step])
        rows = world.rows(draw, config.batch_size - pair_rows)
        batch = rows, world.pair_rows(draw, pair_rows), np.int32(step)
        return jax.tree.map(jnp.asarray, batch)

    gallery = Gallery(config, workdir, pipe, vl)
    merge = jax.jit(lambda base, trained: lora.merge(base, trained, method.lora_scale))

    def preview(step: int, state, metrics) -> None:
        params = {"transformer": merge(pipe.params, state.teacher[STUDENT])} | encoders
        gallery.save(step, params, metrics, ((config.num_steps, 1.0), (2 * config.num_steps, 1.0)))

    def finish(state) -> None:
        merged = jax.tree.map(np.asarray, merge(pipe.params, state.teacher[STUDENT]))
        save_models(config.model, config.vlm, workdir, {"transformer": merged})
        undo = jax.tree.map(np.asarray, lora.scaled(state.teacher[STUDENT], -1.0))
        spec = lora_files.LoraSpec(config.rank, float(config.rank), "")
        lora_files.save_diffusers(workdir / UNDO, undo, spec, pipe.lora.modules)

    return loop.Task(
        state, lambda state, batch: step_fn(state, pipe.params, batch), make_batch, preview,
    ), finish
