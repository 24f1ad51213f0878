"""Command: trains a model on image-text pairs by the config of a run.

    python -m dopsd_jax.train --config configs/z_image_turbo_lora.py --workdir runs/a \
        --config.model=DIR --config.vlm=DIR --config.data=DATA

Run the same command again and it continues from the latest checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from dopsd_jax.core import cli, distributed, memory, mirror, sharding, trackers, trees
from dopsd_jax.core.log import log
from dopsd_jax.core.metrics import GAUGES, read_metrics
from dopsd_jax.core.trees import Tree
from dopsd_jax.data import keeping
from dopsd_jax.data.cache import Cache
from dopsd_jax.data.datasets import Data, read_data
from dopsd_jax.method import lora
from dopsd_jax.method.train_step import Batch, TrainState
from dopsd_jax.mini import stages
from dopsd_jax.run import (
    data_check,
    gauges,
    loop,
    loras,
    model,
    preflight,
    preview_model,
    remat,
)
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
    Features,
    Online,
    cached,
    encode_all,
    load_encoders,
    open_cache,
)
from dopsd_jax.run.keys import AUTO
from dopsd_jax.run.pictures import Previews, run_preflight
from dopsd_jax.run.step import Step
from dopsd_jax.weights.fingerprints import fingerprint
from dopsd_jax.weights.pipeline import DECODER, Pipeline
from dopsd_jax.weights.shipped import vlm_directory

FLAGS = flags.FLAGS


def train(config: ConfigDict, workdir: str | Path) -> TrainState | None:
    """Trains, resuming by itself, and returns the last state; None if nothing was left to do.

    Raises:
        ValueError: Bad config, data, weights, or a workdir of another run.
        loop.TrainingError: The loss or gradient is not finite; the last good checkpoint stays.
    """
    given, workdir = workdir, mirror.local_copy(workdir)
    if config.get("objective") in stages.STAGES:
        return stages.train(config, workdir)

    # Act 1, the checks. All of the config and all of the data, before anything is written or
    # loaded: what is wrong is reported within seconds.
    check_config(config)
    if config.preview_model and config.sample_every:
        preview_model.check_weights(config)
    data = read_data(config, needs_of_rows(config))
    data_check.warn(config, data)
    if config.encode == "ahead":
        check_captions(config, data)

    # Act 2, the workdir. It becomes this run's, or was so before and the run continues. Weights
    # are identified without loading them, so that a wrong workdir fails now.
    config = remat.as_begun(config, workdir)
    workdir = claim(config, identify(config, data), workdir, given)
    if loop.finished(config, workdir):
        return None

    # Act 3, what student and teacher see of the data, and then the model: the encoders and the
    # transformer are not on the devices together, unless every batch is encoded anew.
    entries = Entries(config, data)
    cache = open_cache(config.cache, entries) if config.cache else None
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    distributed.connect(mesh)
    draws_preflight = (
        config.preflight == "on" and needs_teacher(config)
        and not (workdir / preflight.FILE).is_file()
    )
    pipe = load_encoding_parts(
        config, draws_pictures=bool(config.sample_every or draws_preflight), mesh=mesh
    )
    # Before the encoders run, which may take hours: it refuses targets that match no layer.
    earlier, start = loras.stands_on(config, pipe)
    step = Step(config, pipe.denoiser, pipe.lora.targets, mesh, earlier, start)
    made = make_features(config, pipe, data, entries, cache)
    features = BatchFeatures(config, data, entries, made)
    memory.log_devices("the data is encoded")
    pipe.params = load_transformer(config, mesh)
    if loras.only_shapes(earlier):
        step = step.with_earlier(loras.take_loras(loras.parse_list(config.base_lora), pipe))

    # Act 4, the state at step 0, and pictures of what it can do untrained. What fits beside the
    # network is known now that the encoders are gone.
    other = None
    if config.preview_model and config.sample_every:
        other = preview_model.load(config, pipe, mesh)
    if config.remat == AUTO:
        step = remat.fitted(step, data.largest_bucket(), workdir, pipe.params)
    base, state, untuned = first_state(config, pipe, step)
    memory.log_devices("the model is loaded")
    if draws_preflight:
        variables = (step.method.assemble(base, trained)
                     for trained in (state.student, step.method.taught_by(state)))
        run_preflight(config, workdir, pipe, data, features, *variables, mesh)
        memory.log_devices("the preflight is drawn")
    preview = None
    if config.sample_every:
        moved = None if other is None else (other, state.student)
        preview = Previews(
            config, workdir, pipe, data, features, step.method, base, untuned, mesh, moved
        ).save
    del untuned  # a copy of the LoRA's size, which nobody reads from here on

    # Act 5, the updates, from the latest checkpoint on if there is one.
    def make_batch(number: int, rng: jax.Array) -> Batch:
        rows = data.plan.at(number)
        bucket = rows.bucket
        shift = config.shift or pipe.shift_at(config.num_steps, bucket.height, bucket.width)
        rows = rows.take(step.rows)
        kept = np.array([bool(prompt) for prompt in rows.kept]) if rows.kept else None
        return step.batch(number, rng, bucket, shift, features.batch(rows), kept)

    state = loop.run(config, workdir, loop.Task(
        state, lambda state, batch: step(state, base, batch), make_batch,
        preview=preview, epochs=data.plan.epochs, trackers=trackers.parse(config.trackers),
    ))
    if config.sample_every:
        distributed.on_main(lambda: choose_best(config, workdir))
    return state


def identify(config: ConfigDict, data: Data) -> dict[str, str]:
    """Fingerprints of all that a run learns from, found without loading it: name -> fingerprint.

    Raises:
        ValueError: Processes of the run that do not see the same.
    """
    identity = {"model": model.fingerprint(config), "data": data.fingerprint()}
    if data.index:
        identity[workdir_lib.IMAGES] = data.sampled_images()
    if needs_vlm(config):
        identity["vlm"] = fingerprint(vlm_directory(config.vlm))
    for key in ("base_lora", "init_lora"):
        if config[key]:
            identity[key] = loras.fingerprint(config[key])
    if config.init_full:
        identity["init_full"] = workdir_lib.fingerprint(config.init_full)
    if data.keep_prompts:
        identity["keep_prompts"] = keeping.fingerprint(data.keep_prompts)
    for what, fingerprinted in identity.items():
        distributed.check_same(what, fingerprinted)
    return identity


def claim(
    config: ConfigDict, identity: dict[str, str], workdir: Path, given: str | Path
) -> Path:
    """Takes the workdir for this run, and returns it where this process sees it.

    Args:
        config: Of the run.
        identity: See `identify`.
        workdir: Local copy of `given`, in which the first process writes.
        given: As the user named it, a directory or a place in a bucket.

    Raises:
        ValueError: A workdir of another run, or one that not every process sees.
    """
    def take():
        workdir_lib.claim(workdir, config.to_dict(), identity,
                          encodes_images=needs_latents(config))
        send(workdir)

    distributed.on_main(take)
    if not distributed.is_main():
        workdir = mirror.local_copy(given)  # again, now that the first process has written it
    if distributed.any_process(not workdir_lib.is_workdir(workdir)):
        raise ValueError(f"{workdir}: expected a directory that every process sees")
    return workdir


def load_encoding_parts(config: ConfigDict, mesh: Mesh, *, draws_pictures: bool) -> Pipeline:
    """The pipeline with the weights that the run needs beside its transformer, and no others."""
    parts = []
    if not config.cache:
        parts.append("text_encoder")
    if needs_latents(config) and not config.cache:
        parts.append("vae")
    elif draws_pictures:
        parts.append(DECODER)
    return _load(config, mesh, tuple(parts))


def load_transformer(config: ConfigDict, mesh: Mesh) -> Tree:
    """The transformer's parameters, spread over the mesh."""
    return _load(config, mesh, ("transformer",)).params


def _load(config: ConfigDict, mesh: Mesh, parts: tuple[str, ...]) -> Pipeline:
    policy = "full" if config.remat == AUTO else config.remat  # only the train step asks it
    return model.load_model(
        config, dtype=config.dtype, vae_dtype=config.vae_dtype, remat=policy, parts=parts,
        mesh=mesh, encoder_mesh=sharding.own_mesh(), base_dtype=config.base_dtype,
        encoder_dtype=config.encoder_dtype, cache_quantised=config.cache_quantised,
    )


def make_features(
    config: ConfigDict, pipe: Pipeline, data: Data, entries: Entries, cache: Cache | None
) -> Features:
    """What the encoders make of the data: read from a cache, made one by one, or all made now."""
    if cache is not None:
        return cached(cache)
    encoders = load_encoders(config, pipe, data)
    if config.encode == "online":
        return Online(encoders)
    made: dict[str, np.ndarray] = {}
    encode_all(entries.all(), encoders, made.__setitem__)
    pipe.text_params = None  # its memory is needed for the transformer
    return cached(made)


def first_state(
    config: ConfigDict, pipe: Pipeline, step: Step
) -> tuple[Tree | None, TrainState, Tree]:
    """What does not train, None without any, the state at step 0, and the untuned variables.

    The pipeline's own weights are given up for them; the untuned variables may share arrays with
    the other two, so they are of no use after the first update.
    """
    params, pipe.params = pipe.params, None
    trained = step.state_shapes.student
    if step.method.trainable == "lora":
        log.info("%s: %d linears, %s parameters, scale %g", lora.WORDS[config.lora.kind],
                 lora.num_linears(trained), f"{trees.count(trained):,}", step.method.lora_scale)
    else:
        log.info("full fine-tuning: %s parameters", f"{trees.count(trained):,}")
    base, state = step.init(params)
    if step.method.trainable == "full":
        return base, state, {"params": params if config.init_full else state.student}
    # Of the structure that the student's have, so that one program draws both.
    variables = step.method.assemble(base, state.student)
    return base, state, variables | {"lora": lora.weakened(variables["lora"], 0.0)}


def send(workdir: Path) -> None:
    """What is in the workdir, to the bucket that it stands for, if any."""
    if bucket := mirror.mirror_of(workdir):
        bucket.push(now=True)


def choose_best(config: ConfigDict, workdir: Path) -> None:
    """Writes best.json and says which checkpoint it is."""
    # By their names: opening them would wait for the other processes.
    saved = workdir_lib.saved_steps(workdir)
    moved = bool(config.preview_model)
    best = gauges.best_checkpoint(read_metrics(workdir, GAUGES), saved, moved=moved)
    gauges.write_best(workdir, best, moved=moved)
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
