"""Schedules against diffusers' scheduler and the published lists."""

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from dopsd_jax import flow


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 9, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_sigmas_equal_the_schedulers(num_steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
    got = flow.sigmas_shifted(num_steps, shift)
    np.testing.assert_allclose(got, scheduler.sigmas.numpy(), atol=1.2e-7)
    assert got.dtype == np.float32 and got[0] == 1 and got[-1] == 0


def test_four_step_list_of_the_published_trainer():
    # D-OPSD writes t = 1 - sigma, times 1000.
    got = 1000 * (1 - flow.sigmas_shifted(4, 3.0).astype(np.float64))
    np.testing.assert_allclose(got, [0, 100.0000014901161, 250, 500, 1000], atol=1e-4)


def test_eight_step_list_of_the_published_trainer():
    published = [1000, 976.8991, 947.7647, 909.8782, 858.5987, 785.2998, 671.9212, 473.2203, 0]
    np.testing.assert_allclose(1000 * flow.sigmas_reference8(), published, atol=1e-3)


def test_x0_and_euler_step_are_the_straight_line():
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 3, 4))
    x = 0.3 * x0 + 0.7 * noise
    np.testing.assert_allclose(flow.x0_from_velocity(x, noise - x0, 0.7), x0)
    np.testing.assert_allclose(flow.euler_step(x, noise - x0, 0.7, 0.2), 0.8 * x0 + 0.2 * noise)


@pytest.mark.parametrize(
    "args,message",
    [(("shifted", 0, 3.0), "at least 1 denoiser call, got 0"),
     (("shifted", 4, 0.0), "positive number, got 0.0"),
     (("reference8", 4, 3.0), "has 8 steps, got num_steps = 4"),
     (("cosine", 4, 3.0), "expected one of .*reference8.* got 'cosine'")],
)
def test_bad_schedules_say_what_was_expected(args, message):
    with pytest.raises(ValueError, match=message):
        flow.make_sigmas(*args)
