"""Pictures of a run are drawn a few at a time, and come back in their order."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax.core import sharding
from dopsd_jax.method import sampling
from dopsd_jax.models.denoiser import Context
from dopsd_jax.run import pictures


@pytest.mark.parametrize("count,batches", [(2, [2]), (4, [4]), (6, [4, 2]), (8, [4, 4])])
def test_a_few_are_drawn_together_and_none_changes_places(monkeypatch, count, batches):
    asked = []

    def trajectory(denoiser, variables, noise, ctx, sigmas):
        asked.append(len(noise))
        x = noise + ctx.text[:, :1, :1, None]  # of the same row
        return x, jnp.stack([x, x + 100])

    monkeypatch.setattr(sampling, "sample_trajectory", trajectory)
    monkeypatch.setattr(sampling, "decode", lambda pipe, x: np.asarray(x))
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    pipe = SimpleNamespace(denoiser=None, shift_at=lambda *_: 1.0)
    artist = pictures.Artist(pipe, mesh, SimpleNamespace(height=32, width=32), 2, 0.0)
    rows = np.arange(count, dtype=np.float32)
    noise = jnp.broadcast_to(rows[:, None, None, None], (count, 2, 2, 1))
    ctx = Context(10 * rows[:, None, None] * np.ones((1, 3, 5), np.float32),
                  np.ones((count, 3), bool))
    drawn, x0 = artist({}, noise, ctx)
    assert asked == batches
    np.testing.assert_array_equal(drawn[:, 0, 0, 0], 11 * rows)
    np.testing.assert_array_equal(x0[:, 0, 0, 0], [0, 100])
