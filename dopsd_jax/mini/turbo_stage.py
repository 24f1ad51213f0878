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
from dopsd_jax.method.guidance import pad_context
from dopsd_jax.method.train_step import Method, init_state, make_train_step
from dopsd_jax.mini import encoding, ending
from dopsd_jax.mini import rows as rows_lib
from dopsd_jax.mini.base_stage import Gallery, context, load
from dopsd_jax.mini.distill import CRITIC, STUDENT, DistillBatch, distill_loss_and_grad, segments
from dopsd_jax.mini.model import save_models
from dopsd_jax.mini.rows import Rows
from dopsd_jax.run import loop, loras
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.pipeline import Pipeline

TARGETS = (r".*/(attention|feed_forward)/.*/kernel", r".*/adaLN_modulation/kernel")
UNDO = "undistilled_lora.safetensors"  # what turns the distilled transformer back into the base


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
    data = rows_lib.scenes(config.data, pipe), rows_lib.pairs(config.data, pipe, vl)
    empty_ids = encoding.caption_ids(pipe.tokenizer, [""])
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
        {name: ending.optimizer_of(config, rate=rate) for name, rate in rates.items()},
        {name: name for name in rates},
    )
    optimizer = ending.with_end(optimizer, config)
    state = init_state(trained, optimizer, jax.random.key_data(jax.random.fold_in(rng, 2)))
    log.info("LoRA: %s parameters", f"{trees.count(state.student[STUDENT]):,}")
    sigmas = segments(config.num_steps, config.substeps, pipe.shift)

    def objective(trained, average, base, batch: tuple[Rows, Rows, jax.Array]):
        *rows, key = batch
        text, pair = (
            pad_context(context(pipe, vl, encoders, r), encoding.PAIR_TOKENS) for r in rows
        )
        ctx = jax.tree.map(lambda *x: jnp.concatenate(x), text, pair)
        empty = encoding.text_features(pipe, encoders["text_encoder"], *empty_ids)
        noise, latents = (
            jnp.concatenate([getattr(r, name) for r in rows]) for name in ("noise", "latents")
        )
        batch = DistillBatch(
            noise, latents, from_data=jnp.arange(len(noise)) % 3 == 0, ctx=ctx,
            empty=jax.tree.map(lambda x: jnp.repeat(x, len(noise), 0), empty),
            key=key,
        )
        return distill_loss_and_grad(
            trained, base, batch, sigmas, velocity=pipe.denoiser.velocity,
            assemble=lambda base, trained: method.assemble({"params": base}, trained),
            guidance=config.guidance, matching=config.matching,
            last_regression=config.last_regression,
        )

    pair_rows = config.batch_size // 3

    def draw_batch(data, key) -> tuple[Rows, Rows, jax.Array]:
        (scenes, pairs), keys = data, jax.random.split(key, 3)
        rows = rows_lib.draw(scenes, keys[0], config.batch_size - pair_rows)
        return rows, rows_lib.draw(pairs, keys[1], pair_rows), keys[2]

    step_fn = rows_lib.step_that_draws(make_train_step(method, optimizer, objective), draw_batch)
    data = jax.tree.map(jnp.asarray, data)

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
        state, lambda state, data: step_fn(state, pipe.params, data), lambda step, rng: data,
        preview,
    ), finish
