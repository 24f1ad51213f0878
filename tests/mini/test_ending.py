"""Trainings that end in time, their rate falling to 0 before the last update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.mini.common import base
from dopsd_jax.method.train_step import init_state, make_optimizer
from dopsd_jax.mini import ending
from dopsd_jax.run import loop

PARAMS = {"a": np.float32([1.0, -2.0, 0.5])}


@pytest.fixture
def config():
    c = base()
    c.num_train_steps, c.optimizer.decay_steps, c.optimizer.warmup_steps = 1000, 250, 5
    c.optimizer.optimizer, c.optimizer.learning_rate = "adamw", 0.1
    c.batch_size, c.sample_every, c.checkpoint_every, c.log_every = 1, 0, 100, 50
    return c


def states(optimizer, count):
    params, state, found = PARAMS, optimizer.init(PARAMS), []
    for i in range(count):
        grads = jax.tree.map(lambda x, i=i: jnp.cos(x + i), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params["a"])
    return np.stack(found)


def test_an_end_is_the_schedule_that_falls_over_the_last_updates(config):
    config.num_train_steps, config.optimizer.decay_steps = 20, 8
    got = states(ending.with_end(ending.optimizer_of(config), config), 20)
    whole = make_optimizer(**config.optimizer.to_dict(), num_train_steps=20)
    np.testing.assert_allclose(got, states(whole, 20), rtol=1e-6)


class Clock:
    """Time that passes by so much at every look."""

    def __init__(self, each):
        self.now, self.each = 0.0, each

    def __call__(self):
        self.now += self.each
        return self.now


def trained(config, workdir, clock, until=None):
    """A run of updates that do nothing but count; stopped after `until`."""
    optimizer = ending.with_end(ending.optimizer_of(config), config)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = init_state(params, optimizer, jax.random.key_data(jax.random.key(0)))
    seen = []

    @jax.jit
    def step_fn(state, data):
        _, opt_state = optimizer.update(PARAMS, state.opt_state, PARAMS)
        return state.replace(step=state.step + 1, opt_state=opt_state), {"loss": jnp.zeros(())}

    def draw(step, rng):
        seen.append(step + 1)
        if len(seen) == until:
            raise KeyboardInterrupt
        return ()

    task = loop.Task(state, step_fn, draw, ending=ending.Deadline(config, clock))
    try:
        return loop.run(config, workdir, task), seen
    except KeyboardInterrupt:
        return None, seen


def test_a_run_without_a_limit_does_all_its_updates(config, tmp_path):
    config.num_train_steps = 30
    state, seen = trained(config, tmp_path, Clock(100.0))
    assert seen == list(range(1, 31)) and ending.ended(state)


def test_a_run_is_over_in_time_and_its_rate_has_fallen_over_the_same_share(config, tmp_path):
    config.seconds = 400
    clock = Clock(1.0)  # an update a second
    state, seen = trained(config, tmp_path, clock)
    assert 390 <= seen[-1] <= 401 and clock.now <= 402 and ending.ended(state)
    assert int(state.opt_state.last) == seen[-1]
    assert abs(int(state.opt_state.decay) - 100) < 5  # a quarter, as configured


def test_an_end_that_was_brought_forward_outlives_a_crash(config, tmp_path):
    config.seconds, config.checkpoint_every = 400, 20
    trained(config, tmp_path, Clock(1.0), until=350)
    state, after = trained(config, tmp_path, Clock(1.0))
    assert after[0] == 341 and after[-1] == int(state.opt_state.last) and 390 <= after[-1] <= 401


def test_time_enough_changes_nothing(config, tmp_path):
    config.num_train_steps, config.optimizer.decay_steps, config.seconds = 100, 25, 1000
    state, seen = trained(config, tmp_path, Clock(1.0))
    assert seen[-1] == 100 and int(state.opt_state.decay) == 25
