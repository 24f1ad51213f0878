"""FLUX.2 behind the seam: velocities, references as context, LoRA, and the method on top."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax.core import trees
from dopsd_jax.method import flow, lora, train_step
from dopsd_jax.method.rollout import dopsd_loss_and_grad
from dopsd_jax.models.denoiser import Context, reference_tokens
from dopsd_jax.models.flux2 import Flux2Config, Flux2Transformer
from dopsd_jax.models.flux2_denoiser import Flux2Denoiser
from dopsd_jax.weights.flux2 import empirical_shift

CONFIG = Flux2Config(
    num_layers=2, num_single_layers=2, num_attention_heads=2, joint_attention_dim=12,
    in_channels=8, attention_head_dim=16, axes_dims_rope=(4, 4, 4, 4),
)
DENOISER = Flux2Denoiser(Flux2Transformer(CONFIG))
EVERY_LINEAR = (r".*/kernel",)


def draw(tree, seed, std=0.3):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten(
        [jnp.asarray(std * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    )


@pytest.fixture(scope="module")
def params():
    net = DENOISER.network
    args = net.smallest_inputs()
    return draw(jax.eval_shape(net.init, jax.random.key(0), *args)["params"], 1)


def context(B=2, L=5, grids=(), seed=0):
    rng = np.random.default_rng(seed)
    text = jnp.asarray(rng.standard_normal((B, L, 12)), jnp.float32)
    ctx = Context(text, jnp.ones((B, L), bool))
    if grids:
        latents = [jnp.asarray(rng.standard_normal((B, *g, 8)), jnp.float32) for g in grids]
        ctx = ctx.replace(**dict(zip(("ref_tokens", "ref_ids"), reference_tokens(latents),
                                     strict=True)))
    return ctx


NOISE = jnp.asarray(np.random.default_rng(5).standard_normal((2, 3, 4, 8)), jnp.float32)


def test_velocity_is_the_networks_own_sign_and_time(params):
    ctx = context(grids=[(2, 3)])
    sigma = jnp.array([0.9, 0.2])
    v = DENOISER.velocity({"params": params}, NOISE, sigma, ctx)
    want = DENOISER.network.apply(
        {"params": params}, NOISE, sigma, ctx.text, ctx.ref_tokens, ctx.ref_ids
    )
    np.testing.assert_allclose(v, want, atol=1e-6)
    scalar = DENOISER.velocity({"params": params}, NOISE, 0.9, ctx)
    np.testing.assert_allclose(scalar[0], v[0], atol=1e-5)
    half = Flux2Denoiser(Flux2Transformer(CONFIG, jnp.bfloat16))
    assert half.velocity({"params": params}, NOISE, 0.9, ctx).dtype == jnp.float32


def test_reference_tokens_follow_one_another_at_their_own_times():
    ctx = context(grids=[(2, 3), (1, 2)])
    assert ctx.ref_tokens.shape == (2, 8, 8)
    np.testing.assert_array_equal(ctx.ref_ids[0], ctx.ref_ids[1])
    np.testing.assert_array_equal(
        ctx.ref_ids[0], [[10, 0, 0, 0], [10, 0, 1, 0], [10, 0, 2, 0], [10, 1, 0, 0],
                         [10, 1, 1, 0], [10, 1, 2, 0], [20, 0, 0, 0], [20, 0, 1, 0]],
    )


def test_lora_beside_the_parameters_equals_lora_merged_into_them(params):
    ctx = context(grids=[(2, 3)])
    fresh = lora.init(jax.random.key(0), params, EVERY_LINEAR, 3)
    assert lora.num_linears(fresh) == 9 + 2 * 12 + 2 * 2
    velocity = jax.jit(DENOISER.velocity)
    plain = velocity({"params": params}, NOISE, 0.7, ctx)
    np.testing.assert_array_equal(
        velocity({"params": params, "lora": fresh}, NOISE, 0.7, ctx), plain
    )
    for name in trees.flatten(lora.scaled(fresh, 1.0)):
        if not name.endswith("/b"):
            continue
        flat = dict(trees.flatten(fresh))
        flat[name] = draw(flat[name], 3, 0.2)
        one = trees.unflatten(flat)
        beside = velocity({"params": params, "lora": lora.scaled(one, 2.0)}, NOISE, 0.7, ctx)
        merged = velocity({"params": lora.merge(params, one, 2.0)}, NOISE, 0.7, ctx)
        scale = float(jnp.abs(merged).max())
        assert jnp.abs(beside - merged).max() < 2e-5 * scale, name
        assert jnp.abs(beside - plain).max() > 1e-4 * scale, name


def run(params, student_ctx, teacher_ctx, seed=2):
    tree = draw(lora.init(jax.random.key(0), params, EVERY_LINEAR, 2), seed, 0.1)
    sigmas = jnp.asarray(flow.sigmas_shifted(4, empirical_shift(4, 12)))
    method = train_step.Method()
    return jax.jit(lambda student: dopsd_loss_and_grad(
        student, student, {"params": params}, NOISE, student_ctx, teacher_ctx, sigmas,
        velocity=DENOISER.velocity, assemble=method.assemble,
    ))(tree)


def test_a_teacher_that_sees_references_teaches_a_student_that_does_not(params):
    loss, grads, metrics = run(params, context(), context(grids=[(3, 4)]))
    assert metrics["x0"].shape == NOISE.shape
    assert float(loss) > 1e-6
    for name, g in trees.flatten(grads).items():
        assert np.isfinite(g).all() and np.abs(g).max() > 0, name


def test_equal_contexts_give_exactly_zero_loss(params):
    ctx = context(grids=[(3, 4), (2, 2)])
    loss, grads, _ = run(params, ctx, ctx)
    assert float(loss) == 0
    assert all(not np.any(g) for g in jax.tree.leaves(grads))
