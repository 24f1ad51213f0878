"""The loop on a toy objective that has nothing to do with images."""

import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from dopsd_jax.core.metrics import Progress, read_metrics
from dopsd_jax.run import loop


@flax.struct.dataclass
class ToyState:
    step: jax.Array
    w: jax.Array
    rng: jax.Array


def make_config(**changes):
    return ConfigDict({
        "num_train_steps": 6, "batch_size": 2, "log_every": 2, "sample_every": 0,
        "checkpoint_every": 2, "keep_checkpoints": 5, **changes,
    })


def make_task(*, bad_step=None, preview=None, lengths=(3,)):
    """Pulls a number to zero; logs what no other objective logs."""
    def step_fn(state, batch):
        loss = jnp.mean((state.w - batch) ** 2)
        loss = jnp.where(state.step == (-1 if bad_step is None else bad_step), jnp.nan, loss)
        state = state.replace(step=state.step + 1, w=0.9 * state.w)
        return state, {"loss": loss, "kl": loss / 2, "per_part": jnp.stack([loss, 2 * loss])}

    def make_batch(step, rng):
        rng = jax.random.fold_in(jax.random.wrap_key_data(rng), step)
        return jax.random.normal(rng, (lengths[step % len(lengths)],))

    state = ToyState(jnp.zeros((), jnp.int32), jnp.ones(()), jax.random.key_data(jax.random.key(0)))
    return loop.Task(state, jax.jit(step_fn, donate_argnums=0), make_batch, preview=preview)


def losses(workdir):
    return [(r["step"], r["loss"]) for r in read_metrics(workdir)]


def test_any_objective_runs_and_its_own_numbers_are_logged_and_drawn(tmp_path):
    state = loop.run(make_config(), tmp_path, make_task())
    assert int(state.step) == 6 and float(state.w) == pytest.approx(0.9**6)
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["kl"] == pytest.approx(row["loss"] / 2)
        assert np.shape(row["per_part"]) == (2,) and "epochs" not in row
    assert Image.open(tmp_path / "curves.png").size[0] > 1000


def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(tmp_path):
    whole = loop.run(make_config(), tmp_path / "whole", make_task())
    loop.run(make_config(num_train_steps=4), tmp_path / "parts", make_task())
    state = loop.run(make_config(), tmp_path / "parts", make_task())
    assert float(state.w) == float(whole.w)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_not_a_number_stops_the_run(tmp_path):
    with pytest.raises(loop.TrainingError, match="step 4: loss = nan; .*checkpoint of step 2"):
        loop.run(make_config(), tmp_path, make_task(bad_step=3))


def test_not_a_number_before_the_first_save_says_that_none_was_made(tmp_path):
    with pytest.raises(loop.TrainingError, match="loss = nan; no checkpoint was saved yet. Lower"):
        loop.run(make_config(), tmp_path, make_task(bad_step=0))


def test_damaged_small_files_of_a_run_are_named(tmp_path):
    config = make_config(sample_every=6)
    loop.run(config, tmp_path, make_task(preview=lambda *_: None))
    assert loop.finished(config, tmp_path)
    (tmp_path / "samples/.last").write_text("six")
    with pytest.raises(ValueError, match=r"samples/.last: expected the step .*found 'six'; delete"):
        loop.finished(config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for wrong in ('{"loss": 1.0}', "3", '{"step": "x"}'):
        (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], wrong, *lines[1:]]))
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected a JSON object with"):
            loop.run(make_config(num_train_steps=8), tmp_path, make_task())


def test_not_a_number_still_leaves_curves(tmp_path):
    with pytest.raises(loop.TrainingError):
        loop.run(make_config(), tmp_path, make_task(bad_step=3))
    assert Image.open(tmp_path / "curves.png").size[0] > 1000


SLOW = 0.3  # seconds; a toy step takes about a thousandth


def test_compiling_saving_and_drawing_are_not_part_of_the_rate(tmp_path, monkeypatch):
    task = make_task(preview=lambda *_: time.sleep(SLOW), lengths=(3, 5))
    step_fn, made = task.step_fn.__wrapped__, task.make_batch

    def slow_to_trace(state, batch):
        time.sleep(SLOW)
        return step_fn(state, batch)

    shapes = set()

    def slow_at_first(step, rng):
        batch = made(step, rng)
        time.sleep(0 if batch.shape in shapes else SLOW)
        shapes.add(batch.shape)
        return batch

    saved = loop.Checkpoints.save
    monkeypatch.setattr(
        loop.Checkpoints, "save", lambda *args: (saved(*args), time.sleep(SLOW))
    )
    task.step_fn, task.make_batch = jax.jit(slow_to_trace, donate_argnums=0), slow_at_first
    loop.run(make_config(num_train_steps=12, sample_every=4), tmp_path, task)
    rows = read_metrics(tmp_path)
    assert "images_per_second" not in rows[0] and "images_per_second" not in rows[1]
    for row in rows[4:]:
        assert row["images_per_second"] > 2 / (SLOW / 10)


def test_time_left_is_that_of_the_steps_alone():
    seconds = iter([0.0, 100.0, 102.0, 104.0])
    progress = Progress(total=12, start=0, images_per_step=4, clock=lambda: next(seconds))
    assert progress.images_per_second is None and progress.seconds_left(1) is None
    progress.restart()
    progress.lap()
    progress.lap()
    assert progress.images_per_second == 2.0
    assert progress.seconds_left(2) == 20.0


class Drawn:
    """A preview that may fail, as a process killed while drawing."""

    def __init__(self):
        self.steps, self.fails_at = [], None

    def __call__(self, step, state, metrics):
        if step == self.fails_at:
            raise KeyboardInterrupt
        assert float(state.w) == pytest.approx(0.9**step)
        metrics.image(step, "toy", np.zeros((8, 8, 3), np.uint8))
        self.steps.append(step)


def test_a_preview_lost_to_a_kill_is_drawn_on_resume_and_only_then(tmp_path):
    config, drawn = make_config(sample_every=2), Drawn()
    drawn.fails_at = 4
    with pytest.raises(KeyboardInterrupt):
        loop.run(config, tmp_path, make_task(preview=drawn))
    assert drawn.steps == [0, 2]
    drawn.fails_at = None
    loop.run(config, tmp_path, make_task(preview=drawn))
    assert drawn.steps == [0, 2, 4, 6]
    loop.run(config, tmp_path, make_task(preview=drawn))
    assert drawn.steps == [0, 2, 4, 6]


def test_a_run_that_failed_before_its_first_checkpoint_draws_step_0_again(tmp_path):
    config, drawn = make_config(sample_every=2), Drawn()
    drawn.fails_at = 2
    config.checkpoint_every = 3
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            loop.run(config, tmp_path, make_task(preview=drawn))
    assert drawn.steps == [0, 0]


def test_a_finished_run_is_known_without_its_state(tmp_path, caplog):
    config = make_config(sample_every=2)
    assert not loop.finished(config, tmp_path)
    drawn = Drawn()
    drawn.fails_at = 6
    with pytest.raises(KeyboardInterrupt):
        loop.run(config, tmp_path, make_task(preview=drawn))
    assert not loop.finished(config, tmp_path)  # the last picture is owed
    drawn.fails_at = None
    loop.run(config, tmp_path, make_task(preview=drawn))
    with caplog.at_level("INFO", "dopsd_jax"):
        assert loop.finished(config, tmp_path)
    assert "already finished: step 6 of 6" in caplog.text
    assert not loop.finished(make_config(num_train_steps=8), tmp_path)


def test_the_fresh_state_is_freed_before_a_checkpoint_is_restored(tmp_path, monkeypatch):
    loop.run(make_config(num_train_steps=2), tmp_path, make_task())
    task = make_task()
    fresh, restore = task.state, loop.Checkpoints.restore

    def watched(self, like, *args):
        assert fresh.w.is_deleted()
        return restore(self, like, *args)

    monkeypatch.setattr(loop.Checkpoints, "restore", watched)
    assert int(loop.run(make_config(), tmp_path, task).step) == 6
