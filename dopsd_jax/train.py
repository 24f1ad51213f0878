"""Command: config -> mesh -> weights -> data -> loop.

    python -m dopsd_jax.train --config configs/z_image_turbo_lora.py --workdir runs/a \
        --config.model=DIR --config.vlm=DIR --config.data=DATA

Run the same command again and it continues from the latest checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from dopsd_jax.core import cli, distributed, mirror, sharding, trees
from dopsd_jax.core.log import log
from dopsd_jax.core.metrics import GAUGES, read_metrics
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.datasets import read_data
from dopsd_jax.method import flow, lora
from dopsd_jax.method.baselines import draw_sigma
from dopsd_jax.method.train_step import (
    Batch,
    TrainState,
    dopsd,
    draw_noise,
    init_state,
    make_train_step,
    optimizer_of,
    sft,
)
from dopsd_jax.mini import stages
from dopsd_jax.run import gauges, loop, loras, preflight
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.caption_check import check_captions
from dopsd_jax.run.config import (
    check_config,
    needs_latents,
    needs_of_rows,
    needs_teacher,
    needs_vlm,
)
from dopsd_jax.run.features import (
    BatchFeatures,
    Entries,
    Online,
    cached,
    encode_all,
    load_encoders,
    open_cache,
)
from dopsd_jax.run.pictures import Previews, run_preflight
from dopsd_jax.weights.pipeline import DECODER, fingerprint, load_pipeline
from dopsd_jax.weights.shipped import pipeline_directory, vlm_directory

FLAGS = flags.FLAGS


# Act 1, the config checked before anything else, is run/config.py.
# Act 2, the rows, all read and validated before anything is put on a device, is
# data/datasets.py. Act 3, what student and teacher see, is encode.py. Act 4, pictures of the run,
# always from the same noise, is pictures.py.
# Act 5: all together.


def train(config: ConfigDict, workdir: str | Path) -> TrainState | None:
    """Trains, resuming by itself, and returns the last state; None if nothing was left to do.

    Raises:
        ValueError: Bad config, data, weights, or a workdir of another run.
        loop.TrainingError: The loss or gradient is not finite; the last good checkpoint stays.
    """
    given, workdir = workdir, mirror.local_copy(workdir)
    if config.get("objective") in stages.STAGES:
        return stages.train(config, workdir)
    method = check_config(config)
    data = read_data(config, needs_of_rows(config))
    if config.encode == "ahead":
        check_captions(config, data)
    # Weights are identified without loading them: a wrong workdir fails now.
    identity = {"model": fingerprint(pipeline_directory(config.model)),
                "data": data.fingerprint()}
    if needs_vlm(config):
        identity["vlm"] = fingerprint(vlm_directory(config.vlm))
    if config.base_lora:
        identity["base_lora"] = hashlib.sha256(Path(config.base_lora).read_bytes()).hexdigest()
    for what, fingerprinted in identity.items():
        distributed.check_same(what, fingerprinted)
    distributed.on_main(lambda: claim(workdir, config, identity))
    if not distributed.is_main():
        workdir = mirror.local_copy(given)
    if distributed.any_process(not workdir_lib.is_workdir(workdir)):
        raise ValueError(f"{workdir}: expected a directory that every process sees")
    if loop.finished(config, workdir):
        return None

    # Weights, and the contexts that only the encoders can make; then the encoders may go.
    entries = Entries(config, data)
    cache = open_cache(config.cache, entries) if config.cache else None
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    distributed.connect(mesh)
    encodes_images = needs_latents(config) and not config.cache
    looks_ahead = (
        config.preflight == "on" and needs_teacher(config)
        and not (workdir / preflight.FILE).is_file()
    )
    draws_pictures = config.sample_every or looks_ahead
    parts = ("transformer", *([] if config.cache else ["text_encoder"]),
             *(["vae"] if encodes_images else [DECODER] if draws_pictures else []))
    pipe = load_pipeline(
        config.model, dtype=config.dtype, vae_dtype=config.vae_dtype, remat=config.remat,
        parts=parts, mesh=mesh, encoder_mesh=sharding.own_mesh(),
    )
    targets = lora.parse_targets(config.lora.targets, pipe.lora.targets)
    if method.trainable == "lora":
        lora.match_targets(pipe.params, targets)  # before the encoders run
    if cache is not None:
        features = cached(cache)
    elif config.encode == "online":
        features = Online(load_encoders(config, pipe, data))
    else:
        made: dict[str, np.ndarray] = {}
        encode_all(entries.all(), load_encoders(config, pipe, data), made.__setitem__)
        features, pipe.text_params = cached(made), None
    ctxs = BatchFeatures(config, data, entries, features)

    # What trains.
    rng = jax.random.key(config.seed)
    if method.trainable == "lora":
        base = pipe.params
        if config.base_lora:
            base = lora.merge(base, *loras.read_lora(config.base_lora, pipe))
            pipe.params = None
        student = lora.init(jax.random.fold_in(rng, 1), base, targets, config.lora.rank)
        log.info("LoRA: %d linears, %s parameters, scale %g", lora.num_linears(student),
                     f"{trees.count(student):,}", method.lora_scale)
    else:
        base, student = None, trees.cast_floats(pipe.params, jnp.float32)
        pipe.params = None
        log.info("full fine-tuning: %s parameters", f"{trees.count(student):,}")
    optimizer = optimizer_of(config)
    def make_state(student):
        rng_data = jax.random.key_data(jax.random.fold_in(rng, 2))
        return init_state(student, optimizer, rng_data, jnp.dtype(config.ema_dtype))

    placed = sharding.shard(mesh, jax.eval_shape(make_state, student))
    if base is not None:
        state = sharding.place(make_state(student), placed)
    else:  # copies and moments of all weights come into being where they belong
        state = jax.jit(make_state, out_shardings=placed)(student)
    del student  # placing may have copied it

    if looks_ahead:
        run_preflight(
            config, workdir, pipe, data, ctxs, method.assemble(base, state.student), mesh
        )
    preview = None
    if config.sample_every:
        preview = Previews(
            config, workdir, pipe, data, ctxs, method, base, state.student, mesh
        ).save

    # Compile lazily, once per bucket; the persistent cache makes a second start cheap.
    objective = {"dopsd": dopsd, "sft": sft}[config.objective](method, pipe.denoiser.velocity)
    jitted = jax.jit(
        make_train_step(method, optimizer, objective), donate_argnums=0,
        out_shardings=(placed, sharding.replicated(mesh)),
        compiler_options=sharding.compiler_options(mesh),
    )
    spread, size = sharding.batch_sharding(mesh), config.batch_size
    mine = sharding.local_rows(spread, size)

    @functools.partial(jax.jit, static_argnums=(2, 3), out_shardings=(spread, spread))
    def draws(rng, step, shape, shift):
        rng = jax.random.wrap_key_data(rng)
        return draw_noise(rng, step, shape), draw_sigma(rng, step, size, shift)

    @functools.cache
    def schedule(bucket: Bucket):
        """The shift of a bucket's pictures, and the rollout's sigmas."""
        shift = config.shift or pipe.shift_at(config.num_steps, bucket.height, bucket.width)
        sigmas = flow.make_sigmas(config.schedule, config.num_steps, shift)
        return shift, sharding.place(sigmas, sharding.replicated(mesh))

    def make_batch(step: int, rng) -> Batch:
        rows = data.plan.at(step)
        student_ctx, teacher_ctx, latents = sharding.place_rows(
            spread, size, mine, ctxs.batch(rows.take(mine))
        )
        shape = pipe.denoiser.latent_shape(rows.bucket.height, rows.bucket.width)
        shift, sigmas = schedule(rows.bucket)
        noise, sigma = draws(rng, step, (size, *shape), shift)
        return Batch(
            noise, student_ctx, teacher_ctx, sigmas, latents,
            sigma if config.objective == "sft" else None,
        )

    state = loop.run(config, workdir, loop.Task(
        state, lambda state, batch: jitted(state, base, batch), make_batch,
        preview=preview, epochs=data.plan.epochs,
    ))
    if config.sample_every:
        distributed.on_main(lambda: choose_best(workdir))
    return state


def claim(workdir: Path, config: ConfigDict, identity: dict[str, str]) -> None:
    """Takes the workdir for this run, where every process can see it."""
    workdir_lib.claim(workdir, config.to_dict(), identity)
    send(workdir)


def send(workdir: Path) -> None:
    """What is in the workdir, to the bucket that it stands for, if any."""
    if bucket := mirror.mirror_of(workdir):
        bucket.push(now=True)


def choose_best(workdir: Path) -> None:
    """Writes best.json and says which checkpoint it is."""
    # By their names: opening them would wait for the other processes.
    saved = workdir_lib.saved_steps(workdir)
    best = gauges.best_checkpoint(read_metrics(workdir, GAUGES), saved)
    gauges.write_best(workdir, best)
    log.info("best checkpoint: %s", "none is sharp enough, see gauges.jsonl" if best is None
             else f"step {best['step']}, by the rule in {workdir / gauges.BEST}")
    send(workdir)


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory of the run, local or gs://..; made or "
                        "continued.", required=True)
    distributed.define_flags()


def main() -> None:
    if FLAGS.config is None:
        raise ValueError("--config is needed, such as --config configs/z_image_turbo_lora.py")
    if not mirror.is_remote(FLAGS.workdir):
        cli.check_directory(FLAGS.workdir)
    distributed.initialize()
    workdir_lib.enable_compilation_cache()
    state = train(FLAGS.config, FLAGS.workdir)
    if not distributed.is_main():
        return
    workdir = FLAGS.workdir
    if state is not None:
        print(f"step {int(state.step)} of {FLAGS.config.num_train_steps}")
    print(f"pictures    {workdir}/samples")
    print(f"curves      {workdir}/curves.png, {workdir}/metrics.jsonl, {workdir}/tensorboard")
    print(f"checkpoints {workdir}/checkpoints")
    if trainable := FLAGS.config.get("trainable"):
        print(f"export      python -m dopsd_jax.export --workdir {workdir} --format diffusers "
              f"--out {'lora.safetensors' if trainable == 'lora' else 'transformer'}")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main, errors=(loop.TrainingError,))
