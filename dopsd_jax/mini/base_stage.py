"""Stage 2 of the mini model: transformer and encoders together, by flow matching.

Two thirds of the rows see their caption, one third also another picture of the same words, often in
colours that no style has. Were it the target itself, the networks would learn to copy it: a teacher
that draws the same picture from any noise teaches a student of D-OPSD the average of its pictures.

So small a model, trained for an hour, learns colours long before shapes: to draw a tilted thing it
must first see in the noise how the thing lies. So the middle of the transformer is also asked for
that, token by token (`placement_loss`), as larger models are aligned with the features of a vision
encoder (REPA, arXiv 2410.06940). The vision tower in turn is asked for the picture it was shown
(`picture_loss`). What reads the answers is dropped in the end.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.core import trees
from dopsd_jax.core.log import log
from dopsd_jax.method import flow, sampling
from dopsd_jax.method.baselines import flow_matching_loss
from dopsd_jax.method.guidance import GuidedContext, guided
from dopsd_jax.method.rollout import trajectory
from dopsd_jax.method.train_step import Method, init_state, make_train_step
from dopsd_jax.mini import data as data_lib
from dopsd_jax.mini import encoding, ending
from dopsd_jax.mini import rows as rows_lib
from dopsd_jax.mini import world as world_lib
from dopsd_jax.mini.labels import WORLD
from dopsd_jax.mini.model import fresh, save_models
from dopsd_jax.mini.rows import Rows
from dopsd_jax.models import qwen3, qwen3_vl
from dopsd_jax.models.denoiser import Context
from dopsd_jax.run import loop, previews
from dopsd_jax.weights.families import transformer_table
from dopsd_jax.weights.names import stacks_of
from dopsd_jax.weights.pipeline import Pipeline, VisionLanguage, load_pipeline, load_vision_language
from dopsd_jax.weights.shapes import text_shapes, transformer_shapes, vision_shapes

# The names of what reads the answers, among the trained parameters.
PLACEMENT, PICTURE = "placement", "picture"


def read(reader: trees.Tree, x: jax.Array) -> jax.Array:
    """A linear map {kernel [d, n], bias [n]} of the last axis."""
    return x @ reader["kernel"] + reader["bias"]


def placement_loss(reader: trees.Tree, hidden: jax.Array, placement: jax.Array) -> jax.Array:
    """Mean squared error of what a linear map reads in a layer, float32 [B].

    Args:
        reader: {kernel [d, 7], bias [7]}.
        hidden: [B, N, d], image tokens first.
        placement: float32 [B, tokens, 7]; where a token is in no object only that is asked.
    """
    answer = read(reader, hidden[:, : placement.shape[1]])
    weight = jnp.where(jnp.arange(placement.shape[-1]) == 0, 1.0, placement[..., :1])
    return jnp.mean(weight * jnp.square(answer - placement), (1, 2))


def picture_loss(reader: trees.Tree, ctx: Context, rows: Rows, image_token_id: int) -> jax.Array:
    """Mean squared error of latents that a linear map reads in the image tokens, float32 [B]."""
    count = rows.picture.shape[1]
    first = jnp.argmax(rows.ids[0] == image_token_id)  # the same in every row: the template's
    seen = jax.lax.dynamic_slice_in_dim(ctx.text, first, count, axis=1)
    # As the transformer does: a few features of a language model are hundreds of times the others.
    seen = seen * jax.lax.rsqrt(jnp.mean(jnp.square(seen), axis=-1, keepdims=True) + 1e-6)
    return jnp.mean(jnp.square(read(reader, seen) - rows.picture), (1, 2))


def context(pipe: Pipeline, vl: VisionLanguage, params: trees.Tree, rows: Rows):
    """What the rows' captions, or captions and pictures, say."""
    if rows.patches is None:
        return encoding.text_features(pipe, params["text_encoder"], rows.ids, rows.mask)
    return encoding.pair_features(
        pipe, vl, params["text_encoder"], params["vision"], rows.ids, rows.mask, rows.patches
    )


def base_objective(pipe: Pipeline, vl: VisionLanguage):
    """Flow matching over rows of both kinds, and half of every other loss.

    Metrics: `loss`, its parts `loss_text` and `loss_pair`, and beside it `placement` and `picture`.
    """
    middle = pipe.denoiser.network.config.n_layers // 2

    def of_rows(params, rows: Rows):
        kept = []

        def velocity(*args):
            v, layers = pipe.denoiser.velocity_and_layers(*args)
            kept.append(layers)
            return v

        ctx = context(pipe, vl, params, rows)
        loss = flow_matching_loss(
            velocity, {"params": params["transformer"]}, rows.latents, rows.noise, rows.sigma, ctx
        )
        asked = {
            PLACEMENT: placement_loss(params[PLACEMENT], kept[0][middle], rows.placement),
        }
        if rows.patches is not None:
            asked[PICTURE] = picture_loss(params[PICTURE], ctx, rows, vl.config.image_token_id)
        return loss, asked

    def objective(student, teacher, base, batch: tuple[Rows, Rows]):
        def total(params):
            (text, asked), (pair, asked_pair) = (of_rows(params, r) for r in batch)
            beside = {
                name: jnp.mean(jnp.concatenate([a[name] for a in (asked, asked_pair) if name in a]))
                for name in asked_pair
            }
            loss = jnp.mean(jnp.concatenate([text, pair]))
            metrics = {"loss": loss, "loss_text": jnp.mean(text), "loss_pair": jnp.mean(pair)}
            return loss + 0.5 * sum(beside.values()), metrics | beside

        grads, metrics = jax.grad(total, has_aux=True)(student)
        return grads, metrics

    return objective


def load(config: ConfigDict) -> tuple[Pipeline, VisionLanguage]:
    pipe = load_pipeline(config.model, dtype="float32", remat="none")
    return pipe, load_vision_language(config.vlm, pipe, dtype="float32")


class Gallery:
    """Pictures of a stage: prompts as drawn with the given steps, and the teacher's view."""

    COUNT = 10

    def __init__(self, config: ConfigDict, workdir: Path, pipe: Pipeline, vl: VisionLanguage):
        test = data_lib.read_part(config.data, "judge_test")
        held_out = np.isin(np.asarray(WORLD.styles)[test.styles], WORLD.held_out_styles)
        chosen = np.concatenate([
            np.flatnonzero(~held_out)[: self.COUNT], np.flatnonzero(held_out)[: self.COUNT],
        ])
        captions = [test.captions[i] for i in chosen]
        self._real = test.pixels[chosen]
        self._rows = encoding.caption_ids(pipe.tokenizer, captions[: self.COUNT])
        self._pairs = encoding.pair_ids(vl.tokenizer, captions[self.COUNT :])
        self._patches = np.asarray(encoding.patches(self._real[self.COUNT :]))
        self._empty = encoding.caption_ids(pipe.tokenizer, [""])
        self._pipe, self._vl, self._workdir = pipe, vl, workdir
        shape = pipe.denoiser.latent_shape(*self._real.shape[1:3])
        self._noise = sampling.draw_noise(range(self.COUNT), shape)
        self._trajectories = jax.jit(self._draw)

    def _draw(self, params, sigmas, scale):
        v = guided(self._pipe.denoiser.velocity)
        text = params["text_encoder"]
        empty = encoding.text_features(self._pipe, text, *self._empty)
        empty = jax.tree.map(lambda x: jnp.repeat(x, self.COUNT, 0), empty)
        contexts = (
            encoding.text_features(self._pipe, text, *self._rows),
            encoding.pair_features(
                self._pipe, self._vl, text, params["vision"], *self._pairs, self._patches
            ),
        )
        return [
            trajectory({"params": params["transformer"]}, self._noise,
                       GuidedContext(ctx, empty, scale), sigmas, velocity=v)[0]
            for ctx in contexts
        ]

    def save(self, step: int, params, metrics, settings) -> None:
        """One row of pictures per (steps, guidance scale), below the real ones."""
        rows = [("real", np.concatenate([self._real]))]
        for steps, scale in settings:
            sigmas = jnp.asarray(flow.sigmas_shifted(steps, self._pipe.shift))
            x = jnp.concatenate(self._trajectories(params, sigmas, jnp.float32(scale)))
            rows.append((f"{steps} steps x{scale:g}", sampling.decode(self._pipe, x)))
        grid = previews.grid(rows)
        previews.save(self._workdir / "samples" / f"step_{step:06d}.png", grid)
        metrics.image(step, "gallery", grid)


def _reader(inputs: int, outputs: int) -> trees.Tree:
    return {"kernel": np.zeros((inputs, outputs), np.float32),
            "bias": np.zeros(outputs, np.float32)}


def prepare(config: ConfigDict, workdir: Path):
    """The task, and what to do with its last state: write the pipeline with the new weights."""
    pipe, vl = load(config)
    data = rows_lib.scenes(config.data, pipe), rows_lib.pairs(config.data, pipe, vl)
    shapes = {"transformer": transformer_shapes(pipe.denoiser.network),
              "text_encoder": text_shapes(pipe.text_encoder), "vision": vision_shapes(vl.vision)}
    if config.init == "fresh":
        params = fresh(shapes, jax.random.key(config.seed))
    else:
        params = {"transformer": pipe.params, "text_encoder": pipe.text_params,
                  "vision": vl.params}
    network = pipe.denoiser.network.config
    numbers = math.prod(pipe.denoiser.latent_shape(world_lib.SIZE, world_lib.SIZE))
    readers = {
        PLACEMENT: _reader(network.dim, world_lib.PLACEMENT),
        PICTURE: _reader(network.cap_feat_dim, numbers // encoding.IMAGE_TOKENS),
    }
    stacks = (*stacks_of(transformer_table(pipe.denoiser)), *qwen3.STACKS, *qwen3_vl.STACKS)
    optimizer = ending.optimizer_of(config, stacks)
    optimizer = ending.with_end(optimizer, config)
    state = init_state(
        jax.tree.map(jnp.asarray, params | readers), optimizer,
        jax.random.key_data(jax.random.key(config.seed + 1)),
    )
    log.info("%s parameters", f"{trees.count(state.student):,}")
    method = Method(
        trainable="full", teacher="ema", ema_decay=config.ema_decay, ema_warmup=True
    )
    pair_rows = config.batch_size // 3

    def draw_batch(data, key) -> tuple[Rows, Rows]:
        scenes, pairs = data
        keys = jax.random.split(key)
        return (
            rows_lib.draw(scenes, keys[0], config.batch_size - pair_rows,
                          drop=config.caption_dropout),
            rows_lib.draw(pairs, keys[1], pair_rows, drop=config.pair_caption_dropout),
        )

    step_fn = rows_lib.step_that_draws(
        make_train_step(method, optimizer, base_objective(pipe, vl)), draw_batch
    )
    data = jax.tree.map(jnp.asarray, data)

    gallery = Gallery(config, workdir, pipe, vl)

    def preview(step: int, state, metrics) -> None:
        gallery.save(step, state.teacher, metrics, ((2, 1.0), (24, 1.0), (24, 2.5)))

    def finish(state) -> None:
        trained = {name: jax.tree.map(np.asarray, state.teacher[name]) for name in params}
        save_models(config.model, config.vlm, workdir, trained)

    return loop.Task(
        state, lambda state, data: step_fn(state, None, data), lambda step, rng: data, preview,
        epochs=lambda step: step * config.batch_size / len(data[0].latents),
    ), finish
