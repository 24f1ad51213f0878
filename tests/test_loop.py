"""The loop on a toy objective that has nothing to do with images."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from dopsd_jax import loop
from dopsd_jax.core.metrics import read_metrics


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
