"""The mini model's training stages, on the project's own loop and train step."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from dopsd_jax.mini import base_stage, ending, judge, turbo_stage, vae_stage
from dopsd_jax.mini import data as data_lib
from dopsd_jax.mini.model import PIPELINE
from dopsd_jax.run import loop
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.fingerprints import fingerprint

# Objective -> what prepares its task, and what its end leaves in the workdir.
STAGES = {
    "vae": (vae_stage.prepare, PIPELINE),
    "flow_matching": (base_stage.prepare, PIPELINE),
    "step_distillation": (turbo_stage.prepare, PIPELINE),
    "judge": (judge.prepare, judge.FILE),
}


def train(config: ConfigDict, workdir: str | Path):
    """Runs one stage, resuming by itself; leaves its models in `workdir`.

    Returns:
        The last state; None if nothing was left to do.

    Raises:
        ValueError: Bad config, data, weights, or a workdir of another run.
        TrainingError: The loss or gradient is not finite.
    """
    workdir = Path(workdir)
    if config.objective not in STAGES:
        raise ValueError(
            f"objective: expected dopsd or one of {sorted(STAGES)}, got {config.objective!r}"
        )
    identity = {"model": fingerprint(config.model), "vlm": fingerprint(config.vlm),
                "data": data_lib.fingerprint(config.data)}
    # The rate falls towards the last update.
    workdir_lib.claim(workdir, config.to_dict(), identity, fixed=("num_train_steps",))
    prepare, product = STAGES[config.objective]
    deadline = ending.Deadline(config)
    if (workdir / product).exists() and (config.seconds or loop.finished(config, workdir)):
        return None
    task, finish = prepare(config, workdir)
    task.ending = deadline
    state = loop.run(config, workdir, task)
    if ending.ended(state):
        finish(state)
    return state
