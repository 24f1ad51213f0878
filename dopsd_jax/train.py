"""Command: config -> mesh -> weights -> data -> loop.

    python -m dopsd_jax.train --config configs/z_image_turbo_lora.py --workdir runs/a \
        --config.model=DIR --config.vlm=DIR --config.data=DATA

Run the same command again and it continues from the latest checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from dopsd_jax import flow, loop, lora, previews, sample
from dopsd_jax import workdir as workdir_lib
from dopsd_jax.caption_check import check_captions
from dopsd_jax.config_check import check_config
from dopsd_jax.core import cli, distributed, sharding, trees
from dopsd_jax.core.log import log
from dopsd_jax.core.metrics import Metrics
from dopsd_jax.data.batches import BatchRows
from dopsd_jax.data.datasets import Data, read_data
from dopsd_jax.data.images import to_uint8
from dopsd_jax.encode import Contexts, Encoders, Entries, encode_all, open_cache
from dopsd_jax.mini import stages
from dopsd_jax.train_step import (
    Batch,
    Method,
    TrainState,
    dopsd,
    draw_noise,
    init_state,
    make_optimizer,
    make_train_step,
)
from dopsd_jax.weights.pipeline import (
    DECODER,
    Pipeline,
    fingerprint,
    load_pipeline,
    load_vision_language,
)
from dopsd_jax.weights.shipped import pipeline_directory, vlm_directory

FLAGS = flags.FLAGS


# Act 1, the config checked before anything else, is config_check.py.
# Act 2, the rows, all read and validated before anything is put on a device, is
# data/datasets.py. Act 3, what student and teacher see, is encode.py.
# Act 4: pictures of the run, always from the same noise.


class Previews:
    """Grids of base, student and teacher, and both walks, for some rows of one bucket."""

    def __init__(self, config, workdir: Path, pipe: Pipeline, data: Data, ctxs: Contexts,
                 method: Method, base: trees.Tree, student: trees.Tree, mesh: Mesh):
        """`student`: the untrained one, which equals the base; drawn now, and not kept."""
        self._workdir, self._pipe, self._method, self._base = workdir, pipe, method, base
        self._everywhere = sharding.replicated(mesh)
        # One shape for all: the bucket with the most rows.
        of_bucket = list(data.bucket_of.values())
        first = max(dict.fromkeys(of_bucket), key=of_bucket.count)
        rows = [i for i, b in data.bucket_of.items() if b == first][: config.sample_rows]
        keys = tuple(next(iter(data.rows[i].captions)) for i in rows)
        self._targets = to_uint8(np.stack([data.pixels(i) for i in rows]))
        self._student_ctx, self._teacher_ctx = ctxs.batch(BatchRows(first, tuple(rows), keys))
        shape = pipe.denoiser.latent_shape(first.height, first.width)
        self._noise = sample.draw_noise([config.seed + i for i in range(len(rows))], shape)
        self._sigmas = flow.sigmas_shifted(config.sample_steps, config.shift or pipe.shift)
        self._prompt_ctx = None
        if config.sample_prompts:
            self._prompt_ctx = ctxs.prompts(config.sample_prompts)
            seeds = [config.seed + 1000 + i for i in range(len(config.sample_prompts))]
            self._prompt_noise = sample.draw_noise(seeds, shape)
        # Now, because full fine-tuning keeps no base and a resumed run's student has moved.
        untrained = method.assemble(base, student)
        self._base_rows, _ = self._draw(untrained, self._noise, self._student_ctx)
        if self._prompt_ctx is not None:
            self._base_prompts, _ = self._draw(untrained, self._prompt_noise, self._prompt_ctx)

    def _draw(self, variables, noise, ctx) -> tuple[np.ndarray, np.ndarray]:
        noise, ctx, sigmas = sharding.place((noise, ctx, self._sigmas), self._everywhere)
        x, x0 = sharding.fetch(sample.walk(self._pipe.denoiser, variables, noise, ctx, sigmas))
        return sample.decode(self._pipe, jnp.asarray(x)), x0[:, 0]

    def save(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Writes samples/step_N.png and step_N_walk.png, and prompts_N.png if there are any."""
        student = self._method.assemble(self._base, state.student)
        teacher = self._method.assemble(
            self._base, state.student if self._method.teacher == "live" else state.teacher
        )
        ours, walk_s = self._draw(student, self._noise, self._student_ctx)
        theirs, walk_t = self._draw(teacher, self._noise, self._teacher_ctx)
        self._write(metrics, step, "step", previews.grid(
            [("target", self._targets), ("base", self._base_rows), ("student", ours),
             ("teacher", theirs)]
        ))
        walks = [sample.decode(self._pipe, jnp.asarray(w)) for w in (walk_s, walk_t)]
        columns = [
            (f"x0, s = {s}", np.stack(pair)) for s, pair in enumerate(zip(*walks, strict=True))
        ]
        self._write(metrics, step, "walk", previews.grid(columns))
        if self._prompt_ctx is not None:
            ours, _ = self._draw(student, self._prompt_noise, self._prompt_ctx)
            columns = [("base", self._base_prompts), ("student", ours)]
            self._write(metrics, step, "prompts", previews.grid(columns))

    def _write(self, metrics: Metrics, step: int, name: str, pixels: np.ndarray) -> None:
        if distributed.is_main():
            previews.save(self._workdir / "samples" / f"{name}_{step:06d}.png", pixels)
            metrics.image(step, name, pixels)


# Act 5: all together.


def train(config: ConfigDict, workdir: str | Path) -> TrainState | None:
    """Trains, resuming by itself, and returns the last state; None if nothing was left to do.

    Raises:
        ValueError: Bad config, data, weights, or a workdir of another run.
        loop.TrainingError: The loss or gradient is not finite; the last good checkpoint stays.
    """
    if config.get("objective", "dopsd") != "dopsd":
        return stages.train(config, workdir)
    workdir = Path(workdir)
    method = check_config(config)
    data = read_data(config)
    check_captions(config, data.rows, data.bucket_of)
    # Weights are identified without loading them: a wrong workdir fails now.
    identity = {"model": fingerprint(pipeline_directory(config.model)),
                "vlm": fingerprint(vlm_directory(config.vlm)),
                "data": data.fingerprint()}
    for what, fingerprinted in identity.items():
        distributed.check_same(what, fingerprinted)
    distributed.on_main(lambda: workdir_lib.claim(workdir, config.to_dict(), identity))
    if distributed.any_process(not workdir_lib.is_workdir(workdir)):
        raise ValueError(f"{workdir}: expected a directory that every process sees")
    if loop.finished(config, workdir):
        return None

    # Weights, and the contexts that only the encoders can make; then the encoders may go.
    entries = Entries(config, data)
    features = open_cache(config.cache, entries) if config.cache else {}
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    parts = ("transformer", *([DECODER] if config.sample_every else []),
             *([] if config.cache else ["text_encoder"]))
    pipe = load_pipeline(
        config.model, dtype=config.dtype, vae_dtype=config.vae_dtype, remat=config.remat,
        parts=parts, shard=lambda shapes: sharding.shard_params(mesh, shapes),
    )
    targets = lora.parse_targets(config.lora.targets)
    if method.trainable == "lora":
        lora.match_targets(pipe.params, targets)  # before the encoders run
    if not config.cache:
        vl = load_vision_language(config.vlm, pipe, dtype=config.dtype)
        log.info("vision tower loaded; %d of %d language tensors replaced", vl.matched, vl.matched)
        encode_all(entries.all(), Encoders(config, pipe, vl, data), features.__setitem__)
        pipe.text_params = vl.params = None
    ctxs = Contexts(config, data, entries, features)

    # What trains.
    rng = jax.random.key(config.seed)
    if method.trainable == "lora":
        base = pipe.params
        student = lora.init(jax.random.fold_in(rng, 1), base, targets, config.lora.rank)
        log.info("LoRA: %d linears, %s parameters, scale %g", lora.num_linears(student),
                     f"{trees.count(student):,}", method.lora_scale)
    else:
        base, student = None, trees.cast_floats(pipe.params, jnp.float32)
        pipe.params = None
        log.info("full fine-tuning: %s parameters", f"{trees.count(student):,}")
    optimizer = make_optimizer(**{k: config[k] for k in (
        "learning_rate", "warmup_steps", "b1", "b2", "eps", "weight_decay", "max_grad_norm"
    )})
    state = init_state(student, optimizer, jax.random.key_data(jax.random.fold_in(rng, 2)))
    state = sharding.place(
        state, sharding.replicated(mesh) if base is not None
        else sharding.shard_params(mesh, state)
    )
    del student  # placing may have copied it

    preview = None
    if config.sample_every:
        preview = Previews(
            config, workdir, pipe, data, ctxs, method, base, state.student, mesh
        ).save

    # Compile lazily, once per bucket; the persistent cache makes a second start cheap.
    objective = dopsd(method, pipe.denoiser.velocity)
    jitted = jax.jit(make_train_step(method, optimizer, objective), donate_argnums=0)
    noise_fn = jax.jit(
        lambda rng, step, shape: draw_noise(jax.random.wrap_key_data(rng), step, shape),
        static_argnums=2, out_shardings=sharding.batch_sharding(mesh),
    )
    sigmas = sharding.place(
        flow.make_sigmas(config.schedule, config.num_steps, config.shift or pipe.shift),
        sharding.replicated(mesh),
    )
    spread, size = sharding.batch_sharding(mesh), config.batch_size
    mine = sharding.local_rows(spread, size)

    def make_batch(step: int, rng) -> Batch:
        rows = data.plan.at(step)
        student_ctx, teacher_ctx = sharding.place_rows(
            spread, size, mine, ctxs.batch(rows.take(mine))
        )
        shape = pipe.denoiser.latent_shape(rows.bucket.height, rows.bucket.width)
        noise = noise_fn(rng, step, (config.batch_size, *shape))
        return Batch(noise, student_ctx, teacher_ctx, sigmas)

    return loop.run(config, workdir, loop.Task(
        state, lambda state, batch: jitted(state, base, batch), make_batch,
        preview=preview, epochs=data.plan.epochs,
    ))


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory of the run; made or continued.", required=True)
    distributed.define_flags()


def main() -> None:
    if FLAGS.config is None:
        raise ValueError("--config is needed, such as --config configs/z_image_turbo_lora.py")
    cli.check_directory(FLAGS.workdir)
    distributed.initialize()
    workdir_lib.enable_compilation_cache()
    state = train(FLAGS.config, FLAGS.workdir)
    if not distributed.is_main():
        return
    workdir = Path(FLAGS.workdir)
    if state is not None:
        print(f"step {int(state.step)} of {FLAGS.config.num_train_steps}")
    print(f"pictures    {workdir}/samples")
    print(f"curves      {workdir}/curves.png, {workdir}/metrics.jsonl, {workdir}/tensorboard")
    print(f"checkpoints {workdir}/checkpoints")
    if FLAGS.config.get("trainable") == "lora":
        print(f"export      python -m dopsd_jax.export --workdir {workdir} --format diffusers "
              "--out lora.safetensors")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main, errors=(loop.TrainingError,))
