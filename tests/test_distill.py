"""Guidance and step distillation on a small velocity whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax import flow
from dopsd_jax.distill import DistillBatch, distill_loss_and_grad, segments
from dopsd_jax.guidance import GuidedContext, guided, pad_context
from dopsd_jax.models.denoiser import Context
from dopsd_jax.rollout import trajectory


def velocity(variables, x, sigma, ctx):
    """Linear in x, in the mean of the text and in sigma; LoRA adds a b."""
    kernel = variables["params"]["mix"]["kernel"]
    if "lora" in variables:
        kernel = kernel + variables["lora"]["mix"]["a"] @ variables["lora"]["mix"]["b"]
    text = jnp.sum(ctx.text * ctx.text_mask[..., None], (1, 2))[:, None, None, None]
    sigma = jnp.broadcast_to(sigma, x.shape[:1])[:, None, None, None]
    return x @ kernel + text + sigma


def context(seed, length, rows=4):
    rng = np.random.default_rng(seed)
    text = jnp.asarray(rng.standard_normal((rows, length, 2)), jnp.float32)
    return Context(text, jnp.ones((rows, length), bool))


@pytest.fixture
def setting():
    rng = np.random.default_rng(0)
    base = {"mix": {"kernel": jnp.asarray(0.3 * rng.standard_normal((3, 3)), jnp.float32)}}
    noise, latents = (jnp.asarray(rng.standard_normal((4, 2, 2, 3)), jnp.float32) for _ in "ab")
    batch = DistillBatch(noise, latents, jnp.array([True, False, False, False]), context(1, 3),
                         context(2, 5))
    return base, batch


def assemble(base, trained):
    return {"params": base, "lora": trained}


def nothing():
    return {"mix": {"a": jnp.ones((3, 2)), "b": jnp.zeros((2, 3))}}


def test_guidance_is_a_weighted_difference_and_one_is_none(setting):
    base, batch = setting
    variables = {"params": base}
    plus, minus = (velocity(variables, batch.noise, 0.5, c) for c in (batch.ctx, batch.empty))
    for scale in (1.0, 2.5):
        led = GuidedContext(batch.ctx, batch.empty, jnp.float32(scale))
        got = guided(velocity)(variables, batch.noise, 0.5, led)
        np.testing.assert_allclose(got, minus + scale * (plus - minus), rtol=1e-5, atol=1e-5)


def test_padding_a_context_says_nothing_new(setting):
    base, batch = setting
    longer = pad_context(batch.ctx, 9)
    assert longer.text.shape[1] == 9
    got = velocity({"params": base}, batch.noise, 0.5, longer)
    np.testing.assert_allclose(got, velocity({"params": base}, batch.noise, 0.5, batch.ctx))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_segments_end_where_the_coarse_schedule_stands(num_steps):
    fine = segments(num_steps, 3, 3.0)
    coarse = flow.sigmas_shifted(num_steps, 3.0)
    np.testing.assert_allclose(fine[:, 0], coarse[:-1], atol=1e-6)
    np.testing.assert_allclose(fine[:, -1], coarse[1:], atol=1e-6)
    assert np.all(np.diff(fine, axis=1) < 0)


def run(student, base, batch, substeps, guidance):
    return distill_loss_and_grad(
        student, base, batch, segments(2, substeps, 3.0), velocity=velocity, assemble=assemble,
        guidance=guidance,
    )


def test_a_student_equal_to_the_base_has_no_loss_at_one_substep_without_guidance(setting):
    base, batch = setting
    grads, metrics = run(nothing(), base, batch, 1, 1.0)
    assert float(metrics["loss"]) < 1e-10
    grads, metrics = run(nothing(), base, batch, 4, 1.0)
    assert float(metrics["loss"]) > 1e-6
    grads, metrics = run(nothing(), base, batch, 1, 2.0)
    assert float(metrics["loss"]) > 1e-3
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_loss_and_gradient_equal_the_definition_written_out(setting):
    base, batch = setting
    student = {"mix": {"a": 0.1 * jnp.ones((3, 2)), "b": 0.2 * jnp.ones((2, 3))}}
    sigmas = segments(2, 4, 3.0)

    def definition(student):
        x, losses = batch.noise, []
        for fine in sigmas:
            noised = (1 - fine[0]) * batch.latents + fine[0] * batch.noise
            x = jnp.where(batch.from_data[:, None, None, None], noised, x)
            led = GuidedContext(batch.ctx, batch.empty, jnp.float32(2.0))
            end, _ = trajectory({"params": base}, x, led, fine, velocity=guided(velocity))
            target = jax.lax.stop_gradient((end - x) / (fine[-1] - fine[0]))
            v = velocity(assemble(base, student), x, fine[0], batch.ctx)
            losses.append(jnp.mean(jnp.square(v - target)))
            x = jax.lax.stop_gradient(x + (fine[-1] - fine[0]) * v)
        return sum(losses) / len(losses)

    grads, metrics = run(student, base, batch, 4, 2.0)
    value, want = jax.value_and_grad(definition)(student)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, want)
