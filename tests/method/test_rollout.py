"""The rollout's gradient, its stops, its identities and its memory."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax.core import trees
from dopsd_jax.method import flow, lora, rollout, train_step
from dopsd_jax.models.denoiser import Context, reference_tokens
from dopsd_jax.models.flux2 import Flux2Config, Flux2Transformer
from dopsd_jax.models.flux2_denoiser import Flux2Denoiser
from dopsd_jax.models.layers import Dense
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.models.z_image_denoiser import ZImageDenoiser
from dopsd_jax.weights.z_image_names import Z_IMAGE_TARGETS

SCALE = 2.0
SIGMAS = flow.sigmas_shifted(4, 3.0)


class Toy(nn.Module):
    """A small nonlinear velocity that depends on state, sigma and context."""

    @nn.compact
    def __call__(self, x, sigma, ctx):
        text = jnp.sum(ctx.text * ctx.text_mask[..., None], axis=1)
        h = Dense(6, name="mix")(x) + Dense(6, name="text")(text)[:, None, None] + sigma
        return Dense(x.shape[-1], name="out")(jnp.tanh(h))


def velocity(variables, x, sigma, ctx):
    return Toy().apply(variables, x, sigma, ctx)


def with_lora(base, trained):
    return {"params": base, "lora": lora.scaled(trained, SCALE)}


def full(base, trained):
    assert base is None
    return {"params": trained}


def draw(tree, seed, std=0.5):
    """Normal values in the shape of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten(
        [jnp.asarray(std * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    )


def context(seed, length):
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < np.array([[length // 2], [length]])
    return Context(jnp.asarray(rng.standard_normal((2, length, 3)), jnp.float32), jnp.array(mask))


@pytest.fixture(scope="module")
def setup():
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 3, 2)), jnp.float32)
    student_ctx, teacher_ctx = context(1, 4), context(2, 9)
    shapes = jax.eval_shape(Toy().init, jax.random.key(0), noise, 1.0, student_ctx)["params"]
    base = draw(shapes, 3)
    adapters = lora.init(jax.random.key(0), shapes, [".*/kernel"], 2)
    return {
        "student": draw(adapters, 4), "teacher": draw(adapters, 5), "base": base, "noise": noise,
        "student_ctx": student_ctx, "teacher_ctx": teacher_ctx, "sigmas": jnp.asarray(SIGMAS),
    }


@functools.partial(jax.jit, static_argnames=("loss", "assemble", "states"))
def _run(s, loss, assemble, states):
    return rollout.dopsd_loss_and_grad(
        **s, velocity=velocity, assemble=assemble, loss=loss, states=states
    )


def run(s, loss="x0", assemble=with_lora, states="student", **changes):
    return _run(s | changes, loss, assemble, states)


@functools.partial(jax.jit, static_argnames=("loss", "assemble"))
def plain_step_losses(s, student, loss="x0", assemble=with_lora):
    """The method's loop as it stands in the paper, without scan and without value_and_grad."""
    x, losses = s["noise"], []
    for sigma, sigma_next in zip(s["sigmas"][:-1], s["sigmas"][1:], strict=True):
        x = jax.lax.stop_gradient(x)
        v_student = velocity(assemble(s["base"], student), x, sigma, s["student_ctx"])
        v_teacher = velocity(assemble(s["base"], s["teacher"]), x, sigma, s["teacher_ctx"])
        ours, theirs = v_student, jax.lax.stop_gradient(v_teacher)
        if loss == "x0":
            ours, theirs = x - sigma * ours, jax.lax.stop_gradient(x - sigma * theirs)
        losses.append(jnp.mean((ours - theirs) ** 2))
        x = x + (sigma_next - sigma) * v_student
    return jnp.stack(losses)


def assert_trees_close(got, want, rtol=2e-5):
    got, want = trees.flatten(got), trees.flatten(want)
    assert set(got) == set(want)
    for name in want:
        scale = np.abs(want[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=rtol * scale, err_msg=name)


@pytest.mark.parametrize("loss", rollout.LOSSES)
@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_gradient_inside_the_scan_is_that_of_the_summed_loss(setup, loss, num_steps):
    s = setup | {"sigmas": jnp.asarray(flow.sigmas_shifted(num_steps, 3.0))}
    value, grads, metrics = run(s, loss)
    want_steps = plain_step_losses(s, s["student"], loss)
    want, want_grads = jax.value_and_grad(
        lambda p: jnp.mean(plain_step_losses(s, p, loss))
    )(s["student"])
    np.testing.assert_allclose(value, want, rtol=2e-6)
    np.testing.assert_allclose(metrics["step_loss"], want_steps, rtol=1e-5)
    assert_trees_close(grads, want_grads)


def test_gradient_of_all_parameters_is_that_of_the_summed_loss(setup):
    s = setup | {"student": draw(setup["base"], 6), "teacher": setup["base"], "base": None}
    _, grads, _ = run(s, assemble=full)
    want = jax.grad(lambda p: jnp.mean(plain_step_losses(s, p, assemble=full)))(s["student"])
    assert_trees_close(grads, want)


def test_teacher_receives_no_gradient(setup):
    grads = jax.grad(lambda teacher: run(setup, teacher=teacher)[0])(setup["teacher"])
    assert all(not np.any(g) for g in jax.tree.leaves(grads))
    # It is no bystander: another teacher, another loss.
    assert run(setup, teacher=setup["student"])[0] != run(setup)[0]


def test_a_teacher_that_is_the_student_is_still_a_constant(setup):
    s = setup | {"teacher": setup["student"]}
    _, grads, _ = run(s)
    want = jax.grad(lambda p: jnp.mean(plain_step_losses(s, p)))(s["student"])
    assert_trees_close(grads, want)


def test_no_gradient_crosses_from_one_step_to_the_next(setup):
    def step_loss(noise, s):
        return run(setup, noise=noise)[2]["step_loss"][s]

    grads = [jax.grad(step_loss)(setup["noise"], s) for s in range(4)]
    assert np.all(np.abs(grads[0]) > 0)
    assert not np.any(grads[1:])


def test_steps_are_independent_of_what_comes_later(setup):
    changed = setup["sigmas"].at[3:].set(jnp.array([0.3, 0.01]))
    before = run(setup)[2]["step_loss"]
    after = run(setup, sigmas=changed)[2]["step_loss"]
    np.testing.assert_array_equal(before[:3], after[:3])
    assert before[3] != after[3]


def test_the_gradient_is_the_mean_of_every_steps_own(setup):
    x, total = setup["noise"], None
    for s in range(4):
        pair = setup["sigmas"][s : s + 2]
        _, grads, metrics = run(setup, noise=x, sigmas=pair)
        x = metrics["x0"]
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    assert_trees_close(run(setup)[1], jax.tree.map(lambda g: g / 4, total))


def test_equal_contexts_and_weights_give_exactly_zero(setup):
    same = {"teacher": setup["student"], "teacher_ctx": setup["student_ctx"]}
    for loss in rollout.LOSSES:
        value, grads, metrics = run(setup | same, loss)
        assert value == 0 and not np.any(metrics["step_loss"])
        assert all(not np.any(g) for g in jax.tree.leaves(grads))
        for part in same:  # either alone is not enough
            assert run(setup | {part: same[part]}, loss)[0] > 0


def test_x0_loss_is_sigma_squared_times_the_velocity_loss(setup):
    x0, velocity_ = (run(setup, loss)[2] for loss in ("x0", "velocity"))
    np.testing.assert_allclose(
        x0["step_loss"], SIGMAS[:-1] ** 2 * velocity_["step_loss"], rtol=1e-6
    )
    np.testing.assert_array_equal(x0["x0"], velocity_["x0"])


def test_the_loss_is_taken_along_the_samplers_own_walk(setup):
    variables = with_lora(setup["base"], setup["student"])
    sample, x0 = rollout.trajectory(
        variables, setup["noise"], setup["student_ctx"], setup["sigmas"], velocity=velocity
    )
    np.testing.assert_allclose(run(setup)[2]["x0"], sample, atol=1e-6)
    np.testing.assert_allclose(x0[-1], sample, atol=1e-6)  # the last step goes to sigma 0
    x = setup["noise"]
    for s, (sigma, sigma_next) in enumerate(itertools.pairwise(SIGMAS)):
        v = velocity(variables, x, sigma, setup["student_ctx"])
        np.testing.assert_allclose(x0[s], x - sigma * v, atol=2e-6)
        x = x + (sigma_next - sigma) * v
    np.testing.assert_allclose(sample, x, atol=2e-6)


def test_gradients_and_states_are_float32_whatever_comes_in(setup):
    half = trees.cast_floats(
        {k: setup[k] for k in ("student", "teacher", "noise")}, jnp.bfloat16
    )
    value, grads, metrics = run(setup | half)
    assert {x.dtype for x in jax.tree.leaves((value, grads, metrics))} == {jnp.dtype("float32")}


def test_what_does_not_fit_is_named(setup):
    with pytest.raises(ValueError, match=r"loss: expected one of \('x0', 'velocity'\), got 'v'"):
        run(setup, "v")
    with pytest.raises(ValueError, match=r"noise: expected \[B h w C\], got shape \(4, 3, 2\)"):
        run(setup, noise=setup["noise"][0])


def tiny_z_image():
    """A tiny Z-Image behind its adapter, a LoRA preset, and contexts of student and teacher."""
    config = ZImageConfig(
        in_channels=4, dim=64, n_layers=3, n_refiner_layers=1, n_heads=4, cap_feat_dim=32,
        axes_dims=(4, 6, 6), axes_lens=(256, 64, 64),
    )
    ctx = Context(jnp.zeros((2, 64, 32)), jnp.ones((2, 64), bool))
    return ZImageDenoiser(ZImageTransformer(config)), "published", ctx, ctx


def tiny_flux2():
    """The same of a tiny FLUX.2, whose teacher sees references."""
    config = Flux2Config(
        num_layers=2, num_single_layers=3, num_attention_heads=4, joint_attention_dim=32,
        in_channels=4, attention_head_dim=16, axes_dims_rope=(4, 4, 4, 4),
    )
    ctx = Context(jnp.zeros((2, 64, 32)), jnp.ones((2, 64), bool))
    tokens, ids = reference_tokens([jnp.zeros((2, 8, 12, 4))])
    teacher = ctx.replace(ref_tokens=tokens, ref_ids=ids)
    return Flux2Denoiser(Flux2Transformer(config)), r".*/attn/.*/kernel", ctx, teacher


def lora_train_step(family, method):
    """The train step of a tiny network with LoRA, jitted, and its arguments' shapes."""
    denoiser, targets, student_ctx, teacher_ctx = family()
    student_ctx, teacher_ctx = jax.eval_shape(lambda: (student_ctx, teacher_ctx))
    noise = jax.ShapeDtypeStruct((2, 8, 12, 4), jnp.float32)
    base = jax.eval_shape(
        denoiser.network.init, jax.random.key(0), *denoiser.network.smallest_inputs()
    )["params"]
    optimizer = train_step.make_optimizer(
        learning_rate=1e-4, warmup_steps=0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01,
        max_grad_norm=1.0,
    )
    state = jax.eval_shape(lambda: train_step.init_state(
        lora.init(jax.random.key(0), base, lora.parse_targets(targets, Z_IMAGE_TARGETS), 4),
        optimizer, jax.random.key(0),
    ))
    step = train_step.make_train_step(
        method, optimizer, train_step.dopsd(method, denoiser.velocity)
    )

    def batch(num_steps):
        sigmas = jax.ShapeDtypeStruct((num_steps + 1,), jnp.float32)
        return train_step.Batch(noise, student_ctx, teacher_ctx, sigmas)

    return jax.jit(step, donate_argnums=0), state, {"params": base}, batch


@pytest.mark.parametrize("family, anchor", [
    (tiny_z_image, 0.0), (tiny_flux2, 0.0), (tiny_z_image, 1.0),
])
def test_memory_does_not_grow_with_the_number_of_steps(family, anchor):
    step, state, base, batch = lora_train_step(family, train_step.Method(anchor=anchor))
    temporaries = {}
    for num_steps in (1, 8) if anchor else (1, 2, 4, 8):
        # Level 0 spares half the compile time; buffers are planned before it matters.
        compiled = step.lower(state, base, batch(num_steps)).compile(
            compiler_options={"xla_backend_optimization_level": 0}
        )
        temporaries[num_steps] = compiled.memory_analysis().temp_size_in_bytes
    print(f"temporary bytes by number of steps: {temporaries}")
    assert max(temporaries.values()) <= 1.05 * min(temporaries.values()), temporaries


@pytest.mark.parametrize("states", ["teacher", "noised"])
def test_off_policy_states_are_those_of_the_teacher_or_of_the_target(setup, states):
    """Against a loop that first lists the states, and then compares both at each of them."""
    latents = 0.7 * jnp.asarray(np.random.default_rng(8).standard_normal((2, 4, 3, 2)), jnp.float32)
    s, x, visited = setup, setup["noise"], []
    teacher = with_lora(s["base"], s["teacher"])
    for sigma, sigma_next in itertools.pairwise(SIGMAS):
        if states == "noised":
            x = (1 - sigma) * latents + sigma * s["noise"]
        visited.append((x, sigma))
        v = velocity(teacher, x, sigma, s["teacher_ctx"])
        x = x + (sigma_next - sigma) * v

    def want(student):
        losses = []
        for x, sigma in visited:
            ours = velocity(with_lora(s["base"], student), x, sigma, s["student_ctx"])
            theirs = velocity(teacher, x, sigma, s["teacher_ctx"])
            losses.append(sigma**2 * jnp.mean((ours - theirs) ** 2))
        return jnp.mean(jnp.stack(losses))

    value, grads = jax.value_and_grad(want)(s["student"])
    loss, got, _ = run(s, states=states, latents=latents)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    assert_trees_close(got, grads)
    on_policy, _, _ = run(s)
    assert abs(float(on_policy) - float(loss)) > 1e-3 * float(loss)


def test_unknown_states_and_missing_targets_are_refused(setup):
    with pytest.raises(ValueError, match="states: expected one of .*got 'old'"):
        run(setup, states="old")
    with pytest.raises(ValueError, match="states noised.*latents"):
        run(setup, states="noised")
