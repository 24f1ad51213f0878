"""The runs of a comparison: which there are, how each is trained, where its figures are kept."""

from __future__ import annotations

import dataclasses
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dopsd_jax import workdir as workdir_lib
from dopsd_jax.core import cli


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a method at a learning rate and a seed, or an own run's directory.

    Attributes:
        method, rate, seed: Which training.
        workdir: Its directory.
        changes: Keys of the run's config that differ from the comparison's `run_config`.
    """

    method: str
    rate: float
    seed: int
    workdir: Path
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.workdir.name


def settings(file: str) -> ConfigDict:
    """What a config file's get_config says."""
    return runpy.run_path(file)["get_config"]()


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
    """The runs of "runs/a,runs/b", each a method of its own.

    Raises:
        ValueError: A directory that is no run's, or two of one name.
    """
    found = []
    for text in directories.split(","):
        workdir = Path(text.strip())
        told = workdir_lib.read_config(workdir)
        found.append(Run(workdir.name, told["learning_rate"], told["seed"], workdir))
    if len({r.method for r in found}) < len(found):
        raise ValueError(f"checkpoints: expected runs of different names, got {directories!r}")
    return found


def same_data(runs: Sequence[Run]) -> str:
    """The pictures that all runs learned from.

    Raises:
        ValueError: They learned from different ones.
    """
    found = {str(workdir_lib.read_config(run.workdir)["data"]) for run in runs}
    if len(found) > 1:
        raise ValueError(
            f"checkpoints: expected runs on the same data, got {', '.join(sorted(found))}"
        )
    return found.pop()


def train(config: ConfigDict, run: Run) -> None:
    """Trains a run by the train command; a finished one is left as it is.

    Raises:
        SystemExit: The training ended with an error.
    """
    if config.num_train_steps in workdir_lib.saved_steps(run.workdir):
        return
    changes = {
        "learning_rate": run.rate, "seed": run.seed + 30, "num_train_steps": config.num_train_steps,
        "checkpoint_every": config.measure_every, "sample_every": 0, "keep_checkpoints": 1000,
        "log_every": config.measure_every, "preflight": "off",
        **run.changes,
    }
    cli.run_module(
        "dopsd_jax.train", "--config", config.run_config, "--workdir", str(run.workdir),
        *(f"--config.{key}={value}" for key, value in changes.items()),
    )
