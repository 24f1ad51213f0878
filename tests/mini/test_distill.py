"""Guidance and step distillation on a small velocity whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dopsd_jax.method import flow
from dopsd_jax.method.guidance import GuidedContext, guided, pad_context
from dopsd_jax.method.rollout import trajectory
from dopsd_jax.mini.distill import (
    CRITIC,
    STUDENT,
    DistillBatch,
    distill_loss_and_grad,
    matching_direction,
    segments,
)
from dopsd_jax.models.denoiser import Context


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
                         context(2, 5), jax.random.key(3))
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
    grads, metrics = distill_loss_and_grad(
        {STUDENT: student}, base, batch, segments(2, substeps, 3.0), velocity=velocity,
        assemble=assemble, guidance=guidance,
    )
    assert set(grads) == {STUDENT}
    return grads[STUDENT], metrics


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


def test_a_critic_that_guesses_as_the_base_pulls_nowhere(setting):
    base, batch = setting
    student = {"mix": {"a": 0.1 * jnp.ones((3, 2)), "b": 0.2 * jnp.ones((2, 3))}}
    critics = [nothing(), {"mix": {"a": jnp.ones((3, 2)), "b": 0.3 * jnp.ones((2, 3))}}]
    same, other = (
        distill_loss_and_grad(
            {STUDENT: student, CRITIC: critic}, base, batch, segments(2, 2, 3.0),
            velocity=velocity, assemble=assemble, guidance=1.0, matching=5.0,
        )
        for critic in critics
    )
    alone, _ = run(student, base, batch, 2, 1.0)
    jax.tree.map(np.testing.assert_array_equal, same[0][STUDENT], alone)
    for metrics in (same[1], other[1]):
        assert float(metrics["critic_loss"]) > 0.1
    assert np.abs(other[0][STUDENT]["mix"]["b"] - alone["mix"]["b"]).max() > 1e-2


def test_without_its_regression_the_last_step_matches_alone(setting):
    base, batch = setting
    low_rank = {"mix": {"a": 0.1 * jnp.ones((3, 2)), "b": 0.2 * jnp.ones((2, 3))}}

    def grads(matching, last_regression):
        grads, metrics = distill_loss_and_grad(
            {STUDENT: low_rank, CRITIC: low_rank}, base, batch, segments(2, 2, 3.0),
            velocity=velocity, assemble=assemble, guidance=2.0, matching=matching,
            last_regression=last_regression,
        )
        assert metrics["step_loss"].shape == (2 if last_regression else 1,)
        return grads[STUDENT]

    both, one, alone = grads(3.0, 1.0), grads(0.0, 1.0), grads(3.0, 0.0)
    first = grads(0.0, 0.0)  # what is left is the first step's
    jax.tree.map(
        lambda b, o, a, f: np.testing.assert_allclose(b - o, a - f, rtol=1e-4, atol=1e-6),
        both, one, alone, first,
    )
    assert np.abs(alone["mix"]["b"] - first["mix"]["b"]).max() > 1e-2
    assert np.abs(one["mix"]["b"] - first["mix"]["b"]).max() > 1e-2


def test_the_direction_leads_from_the_bases_guess_in_units_of_its_distance():
    x0, real, fake = (jnp.full((2, 1, 1, 2), v) for v in (1.0, 3.0, -1.0))
    np.testing.assert_allclose(matching_direction(x0, real, fake), (-1 - 3) / 2)


def test_matching_finds_the_mean_and_the_spread_of_what_the_base_draws():
    """Pictures are N(0.5, 1), the student draws N(shift, scale^2), the critic is told neither.

    The four fine steps end at a spread of 0.72, and so does regression by itself.
    """
    def velocity(variables, x, sigma, ctx):
        p = variables["params"] | variables["lora"] if "lora" in variables else variables["params"]
        if "scale" in p:  # the student: one step from noise to a picture
            return x - (p["shift"] + p["scale"] * x)
        sigma = jnp.broadcast_to(sigma, x.shape[:1])[:, None, None, None]
        share = jnp.square((1 - sigma) * p["spread"])
        share = (1 - sigma) * jnp.square(p["spread"]) / (share + jnp.square(sigma))
        x0 = p["mean"] + share * (x - (1 - sigma) * p["mean"])  # of normal pictures, exactly
        return (x - x0) / sigma

    base = {"mean": jnp.float32(0.5), "spread": jnp.float32(1.0)}
    trained = {
        STUDENT: {"shift": jnp.float32(0.0), "scale": jnp.float32(0.3)},
        CRITIC: {"mean": jnp.float32(0.0), "spread": jnp.float32(0.5)},
    }
    rates = {STUDENT: optax.adam(0.01), CRITIC: optax.adam(0.03)}
    optimizer = optax.partition(rates, {name: name for name in rates})
    shape, ctx = (256, 1, 1, 1), context(1, 1, 256)

    def update(carry, key):
        trained, state = carry
        batch = DistillBatch(
            jax.random.normal(key, shape), jnp.zeros(shape), jnp.zeros(256, bool), ctx, ctx,
            jax.random.fold_in(key, 1),
        )
        grads, _ = distill_loss_and_grad(
            trained, base, batch, segments(1, 4, 1.0), velocity=velocity, assemble=assemble,
            guidance=1.0, matching=100.0,
        )
        updates, state = optimizer.update(grads, state, trained)
        return (optax.apply_updates(trained, updates), state), trained[STUDENT]

    keys = jax.random.split(jax.random.key(0), 600)
    _, path = jax.lax.scan(update, (trained, optimizer.init(trained)), keys)
    assert float(jnp.mean(path["shift"][-100:])) == pytest.approx(0.5, abs=0.03)
    assert float(jnp.mean(path["scale"][-100:])) == pytest.approx(1.0, abs=0.05)
