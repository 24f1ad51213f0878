"""Schedules against diffusers' scheduler and the published lists."""

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from dopsd_jax.method import flow
from dopsd_jax.weights.flux2 import empirical_shift


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


# (width, height) -> sigmas of the sampler at 4 steps, and of the published trainer, between the
# 1 and the 0 at their ends (models.md 4.3, method.md 2.4).
KLEIN = {
    (1024, 1024): ([0.96738404, 0.90814394, 0.76719993], [0.95192975, 0.83216244, 0.009799512]),
    (1152, 896): ([0.9672124, 0.9076902, 0.7662293], [0.9516808, 0.83140314, 0.009746992]),
    (1152, 864): ([0.9668229, 0.906662, 0.76403505], [0.9511162, 0.8296846, 0.00962984]),
    (1248, 832): ([0.9672768, 0.9078606, 0.76659364], [0.9517743, 0.8316882, 0.009766654]),
    (1280, 720): ([0.9660306, 0.90457475, 0.7596039], [0.94996816, 0.8262059, 0.009399702]),
    (1344, 576): ([0.9643908, 0.90027463, 0.7505724], [0.9475951, 0.8190806, 0.008955646]),
    (512, 512): ([0.95808536, 0.8839819, 0.7174966], [0.9385053, 0.7925789, 0.0075692367]),
}


@pytest.mark.parametrize("size", KLEIN)
def test_klein_lists_are_the_published_ones(size):
    shift = empirical_shift(4, size[0] * size[1] // 256)
    for schedule, middle in zip(("shifted", "reference"), KLEIN[size], strict=True):
        got = flow.make_sigmas(schedule, 4, shift)
        np.testing.assert_allclose(got, [1, *middle, 0], rtol=1e-6, atol=1.2e-7)
        assert got.dtype == np.float32 and got[0] == 1 and got[-1] == 0


@pytest.mark.parametrize("num_tokens", [16, 1024, 4096, 4300, 4301, 8192])
@pytest.mark.parametrize("num_steps", [2, 4, 8, 50])
def test_klein_sigmas_equal_the_pipelines(num_steps, num_tokens):
    mu = compute_empirical_mu(num_tokens, num_steps)
    shift = empirical_shift(num_steps, num_tokens)
    assert np.log(shift) == pytest.approx(mu, rel=1e-12)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
    got = flow.make_sigmas("shifted", num_steps, shift)
    np.testing.assert_allclose(got, scheduler.sigmas.numpy(), atol=1.2e-7)
    scheduler.set_timesteps(num_steps, mu=mu)
    got = flow.make_sigmas("reference", num_steps, shift)
    np.testing.assert_allclose(got, scheduler.sigmas.numpy(), rtol=1e-6, atol=1.2e-7)


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
     (("reference", 1, 3.0), "at least 2 denoiser calls, got 1"),
     (("reference", 4, -1.0), "positive number, got -1.0"),
     (("reference8", 4, 3.0), "has 8 steps, got num_steps = 4"),
     (("cosine", 4, 3.0), "expected one of .*reference8.* got 'cosine'")],
)
def test_bad_schedules_say_what_was_expected(args, message):
    with pytest.raises(ValueError, match=message):
        flow.make_sigmas(*args)
