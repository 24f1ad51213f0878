"""The files of a run's numbers after a kill: every step stands in them once."""

import itertools
import json
import types

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from dopsd_jax.core.metrics import GAUGES, METRICS, Metrics, read_metrics

LAST, EVERY = 4, 2  # a checkpoint and pictures at every second step


@pytest.fixture(autouse=True)
def _files_in_order(monkeypatch):
    """Event files are read in the order of their names, which begin with whole seconds."""
    seconds = itertools.count(1_000_000_000)
    clock = types.SimpleNamespace(time=lambda: next(seconds))
    monkeypatch.setattr(event_file_writer, "time", clock)


class Disk:
    """What survives a kill besides the metrics: the latest checkpoint and the last pictures."""

    def __init__(self):
        self.saved, self.drawn = 0, -1


def writes(metrics, disk):
    """A resumed run as the loop makes it, a yield after every write."""
    def draw(step):
        metrics.image(step, "step", np.zeros((2, 2, 3), np.uint8))
        yield
        metrics.gauges(step, {"style": 10.0 * step})
        yield
        disk.drawn = step
        yield

    if disk.saved % EVERY == 0 and (disk.saved == 0 or disk.drawn < disk.saved):
        yield from draw(disk.saved)
    for step in range(disk.saved + 1, LAST + 1):
        metrics.scalars(step, {"loss": 1 / step, "step_loss": [step, 2 * step]})
        yield
        if step % EVERY == 0:
            disk.saved = step
            yield
            yield from draw(step)


def start(workdir, disk, kill_after):
    """A start that is killed after some writes; whether it came to its end before."""
    workdir.mkdir(exist_ok=True)
    owed = disk.saved % EVERY == 0 and (disk.saved == 0 or disk.drawn < disk.saved)
    metrics = Metrics(workdir, disk.saved, redraws=owed)
    done = len(list(itertools.islice(writes(metrics, disk), kill_after)))
    metrics.close()
    return done < kill_after


def shown(workdir):
    """Tag -> steps, as TensorBoard shows them."""
    board = EventAccumulator(str(workdir / "tensorboard")).Reload()
    tags = {tag: board.Scalars(tag) for tag in board.Tags()["scalars"]}
    tags |= {tag: board.Images(tag) for tag in board.Tags()["images"]}
    return {tag: [event.step for event in events] for tag, events in tags.items()}


def assert_once(workdir):
    steps, drawn = [*range(1, LAST + 1)], [*range(0, LAST + 1, EVERY)]
    assert [r["step"] for r in read_metrics(workdir)] == steps
    assert [r["step"] for r in read_metrics(workdir, GAUGES)] == drawn
    assert shown(workdir) == {
        "train/loss": steps, "train/step_loss/0": steps, "train/step_loss/1": steps,
        "step": drawn, "gauges/style": drawn,
    }


WRITES = 15


@pytest.mark.parametrize("first", range(WRITES + 1))
def test_every_step_stands_once_wherever_a_run_is_killed(tmp_path, first):
    for second in range(0, WRITES + 1, 2):
        workdir, disk = tmp_path / str(second), Disk()
        for kill_after in (first, second, second):
            start(workdir, disk, kill_after)
        assert start(workdir, disk, WRITES + 1)
        assert_once(workdir)


def test_a_step_whose_pictures_are_there_keeps_them(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.scalars(step, {"loss": 1.0})
        metrics.gauges(step, {"style": 1.0})
    metrics.close()
    Metrics(tmp_path, 2).close()
    for name in (METRICS, GAUGES):
        assert [r["step"] for r in read_metrics(tmp_path, name)] == [1, 2]
    assert shown(tmp_path) == {"train/loss": [1, 2], "gauges/style": [1, 2]}


def test_names_of_older_runs_and_a_torn_line_are_read(tmp_path):
    old = json.dumps({"step": 1, "look": 2.0, "teacher_look": 3.0})
    (tmp_path / GAUGES).write_text(old + '\n{"step": 2, "lo')
    Metrics(tmp_path, 1).close()
    assert read_metrics(tmp_path, GAUGES) == [{"step": 1, "style": 2.0, "teacher_style": 3.0}]


def test_rows_of_older_runs_are_read_under_the_present_names(tmp_path):
    (tmp_path / GAUGES).write_text('{"step": 0, "look": 3.0, "teacher_look": 2.0, "drift": 1.0}\n')
    assert read_metrics(tmp_path, GAUGES) == [
        {"step": 0, "style": 3.0, "teacher_style": 2.0, "drift": 1.0}
    ]
