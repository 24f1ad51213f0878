"""Runs of a toy objective that kill themselves with SIGKILL, and what their files hold at last."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dopsd_jax.core import metrics as metrics_lib
from dopsd_jax.core.metrics import GAUGES, read_metrics

ROOT = Path(__file__).parents[2]


def child(workdir, moment):
    """Trains at `workdir` and dies at a moment: after a call, "NAME STEP", or never, "".

    "uncommitted STEP": after the pictures of a step whose checkpoint was not yet on disk.
    """
    from test_loop import make_config, make_task

    from dopsd_jax.run import loop

    name, _, at = moment.partition(" ")

    def then_dies(call, later=0):
        def wrapped(self, step, *args):
            call(self, step, *args)
            if step == int(at) + later:
                os.kill(os.getpid(), signal.SIGKILL)
        return wrapped

    if name == "save":
        def save(self, step, *args, call=loop.Checkpoints.save):
            call(self, step, *args)
            self.wait()
        loop.Checkpoints.save = then_dies(save)
    elif name == "uncommitted":
        def save(self, step, *args, call=loop.Checkpoints.save):
            if step != int(at):
                call(self, step, *args)
        loop.Checkpoints.save = save
        metrics_lib.Metrics.scalars = then_dies(metrics_lib.Metrics.scalars, later=1)
    elif name:
        setattr(metrics_lib.Metrics, name, then_dies(getattr(metrics_lib.Metrics, name)))

    def preview(step, state, metrics):
        metrics.image(step, "toy", np.zeros((8, 8, 3), np.uint8))
        metrics.gauges(step, {"style": float(state.w)})

    loop.run(make_config(sample_every=2), workdir, make_task(preview=preview))


def start(workdir, moment=""):
    return subprocess.run(
        [sys.executable, __file__, str(workdir), moment], capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'tests' / 'run'}"), check=False,
    )


def numbers(workdir):
    """Rows of both files, without the rates, which are never the same."""
    return [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]
        for rows in (read_metrics(workdir), read_metrics(workdir, GAUGES))
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = start(workdir)
    assert done.returncode == 0, done.stderr
    return numbers(workdir)


@pytest.mark.parametrize("moments", [
    ("gauges 0", "gauges 0"), ("save 2", "gauges 2"), ("gauges 4", "gauges 4"),
    ("uncommitted 4", "image 4"), ("uncommitted 4", "save 2")])
def test_a_run_killed_twice_holds_each_step_once(whole, tmp_path, moments):
    for moment in moments:
        killed = start(tmp_path / "run", moment)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = start(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / "run") == whole
    assert [row["step"] for row in whole[0]] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in whole[1]] == [0, 2, 4, 6]


if __name__ == "__main__":
    child(*sys.argv[1:])
