"""The runs of a comparison: which there are, how each is trained, where its figures are kept."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dopsd_jax.compare.jobs import Job, run_all
from dopsd_jax.core import cli
from dopsd_jax.run import loras, model
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.loras import Named


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a method at a learning rate and a seed, or an own run's directory.

    Attributes:
        method, rate, seed: Which training.
        workdir: Its directory.
        changes: Keys of the run's config that differ from the comparison's `run_config`.
        strength: How strongly its LoRA counts.
        besides: Further LoRAs that are drawn with, at any step of this run.
    """

    method: str
    rate: float
    seed: int
    workdir: Path
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    strength: float = 1.0
    besides: tuple[Named, ...] = ()

    @property
    def name(self) -> str:
        return self.workdir.name


def settings(file: str) -> ConfigDict:
    """The config of a run's config file, the comparison's `run_config`.

    Raises:
        ValueError: No such file, or whatever goes wrong in it, with the line.
    """
    return cli.load_config(file, flag="config.run_config")


def planned(config: ConfigDict, directory: Path, *, rates: dict[str, tuple[float, ...]],
            seeds: tuple[int, ...], **changes) -> list[Run]:
    """Runs of every method at its rates, for every seed, each in a directory of its own."""
    return [
        Run(method, rate, seed, directory / _name(method, rate, seed),
            {**config.methods[method].to_dict(), **changes})
        for method in rates for rate in rates[method] for seed in seeds
    ]


def _name(method: str, rate: float, seed: int) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '_', method)}-{rate:g}-{seed}"


def own_runs(directories: str) -> list[Run]:
    """The runs of "runs/a,runs/b:0.7,runs/a+c.safetensors:0.5", each a method of its own.

    What is joined by + is drawn together; the first of it is the run. A number behind : is how
    strongly a LoRA counts.

    Raises:
        ValueError: A directory that is no run's, a strength that is no number, or two of one name.
    """
    found = []
    for text in directories.split(","):
        first, *besides = (loras.parse(part.strip()) for part in text.split("+"))
        workdir = Path(first.path)
        config = workdir_lib.read_config(workdir)
        if given := [f"{key}={file}" for key, file in model.files_of(config).items() if file]:
            raise ValueError(f"checkpoints: {workdir} was trained with {', '.join(given)}, but "
                             "pictures are drawn with the model that comes with the package")
        method = "+".join(
            Path(n.path).name + ("" if n.strength == 1 else f":{n.strength:g}")
            for n in (first, *besides)
        )
        found.append(Run(
            method, config["learning_rate"], config["seed"], workdir, {}, first.strength,
            tuple(besides),
        ))
    if len({r.method for r in found}) < len(found):
        raise ValueError(f"checkpoints: expected runs of different names, got {directories!r}")
    return found


def same_data(runs: Sequence[Run]) -> str:
    """The pictures that all runs learned from; where they lie may differ.

    Raises:
        ValueError: They learned from different ones.
    """
    places = {run.workdir: str(workdir_lib.read_config(run.workdir)["data"]) for run in runs}
    if len({workdir_lib.read_identity(run.workdir)["data"] for run in runs}) > 1:
        found = ", ".join(f"{run.name}: {places[run.workdir]}" for run in runs)
        raise ValueError(f"checkpoints: expected runs on the same data, got {found}")
    return next((p for p in places.values() if Path(p).exists()), next(iter(places.values())))


def train_all(config: ConfigDict, runs: Sequence[Run]) -> None:
    """Trains runs by the train command, each with a file in logs/; finished ones stay.

    Raises:
        ValueError: A training ended with an error.
    """
    waiting = [r for r in runs if config.num_train_steps not in workdir_lib.saved_steps(r.workdir)]
    run_all([_job(config, run) for run in waiting], "runs trained")


def _job(config: ConfigDict, run: Run) -> Job:
    changes = {
        "learning_rate": run.rate, "seed": run.seed + 30, "num_train_steps": config.num_train_steps,
        "checkpoint_every": config.measure_every, "sample_every": 0, "keep_checkpoints": 1000,
        "log_every": config.measure_every, "preflight": "off",
        **run.changes,
    }
    runs = run.workdir.parent
    return Job(
        ("dopsd_jax.train", "--config", config.run_config, "--workdir", str(run.workdir),
         *(f"--config.{key}={value}" for key, value in changes.items())),
        runs.parent / "logs" / f"{runs.name}-{run.name}.log",
    )
