"""One optimizer update: accumulation, warm-up, teachers, full fine-tuning, refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dopsd_jax.core import trees
from dopsd_jax.method import flow, lora, train_step
from dopsd_jax.method.train_step import Batch, Method
from dopsd_jax.models.denoiser import Context
from dopsd_jax.models.layers import Dense


class Toy(nn.Module):
    """A small nonlinear velocity that depends on state, sigma and context."""

    @nn.compact
    def __call__(self, x, sigma, ctx):
        text = jnp.sum(ctx.text * ctx.text_mask[..., None], axis=1)
        h = Dense(6, name="mix")(x) + Dense(6, name="text")(text)[:, None, None] + sigma
        return Dense(x.shape[-1], name="out")(jnp.tanh(h))


def velocity(variables, x, sigma, ctx):
    return Toy().apply(variables, x, sigma, ctx)


def draw(tree, seed, std=0.5):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten(
        [jnp.asarray(std * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    )


def make_batch(seed, rows=4, num_steps=3):
    rng = np.random.default_rng(seed)

    def context(length):
        mask = np.arange(length) < rng.integers(1, length + 1, (rows, 1))
        text = rng.standard_normal((rows, length, 3))
        return Context(jnp.asarray(text, jnp.float32), jnp.asarray(mask))

    noise = jnp.asarray(rng.standard_normal((rows, 4, 3, 2)), jnp.float32)
    sigmas = jnp.asarray(flow.sigmas_shifted(num_steps, 3.0))
    return Batch(noise, context(4), context(9), sigmas)


@functools.cache
def base():
    batch = make_batch(0)
    shapes = jax.eval_shape(Toy().init, jax.random.key(0), batch.noise, 1.0, batch.student_ctx)
    return draw(shapes["params"], 1)


@functools.cache
def make_optimizer(**changes):
    settings = dict(
        learning_rate=1e-2, warmup_steps=0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0,
        max_grad_norm=1.0,
    )
    return train_step.make_optimizer(**(settings | changes))


def make_state(optimizer, trainable="lora"):
    student = base()
    if trainable == "lora":
        fresh = lora.init(jax.random.key(0), base(), [".*/kernel"], 2)
        student = draw(fresh, 2)
    return train_step.init_state(
        jax.tree.map(jnp.copy, student), optimizer, jax.random.key(5)
    )


@functools.cache
def sgd():
    return optax.sgd(0.1)


@functools.cache
def jitted(method, optimizer):
    return jax.jit(
        train_step.make_train_step(method, optimizer, train_step.dopsd(method, velocity)),
        compiler_options={"xla_backend_optimization_level": 0},  # half the compile time
    )


def run(method, optimizer, updates=3, state=None):
    step = jitted(method, optimizer)
    state = state or make_state(optimizer, method.trainable)
    frozen = {"params": base()} if method.needs_base else None
    log = []
    for i in range(updates):
        state, metrics = step(state, frozen, make_batch(i))
        log.append(jax.tree.map(np.asarray, metrics))
    return state, log


def assert_close(got, want, atol):
    got, want = trees.flatten(got), trees.flatten(want)
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=atol, err_msg=name)


def equal(tree, other):
    same = jax.tree.map(lambda x, y: bool(np.all(np.asarray(x) == np.asarray(y))), tree, other)
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_equal_one_big_batch(parts):
    # Plain gradient descent: Adam would amplify the rounding of gradients near zero.
    optimizer = sgd()
    whole, log = run(Method(ema_decay=0.5), optimizer)
    split, split_log = run(Method(ema_decay=0.5, accumulation=parts), optimizer)
    assert_close(split.student, whole.student, 1e-6)
    assert_close(split.teacher, whole.teacher, 1e-6)
    for got, want in zip(split_log, log, strict=True):
        assert got["step_loss"].shape == (3,)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)


def test_accumulation_must_divide_the_batch():
    with pytest.raises(ValueError, match="a multiple of accumulation = 3, got 4"):
        run(Method(accumulation=3), make_optimizer(), updates=1)


def test_warm_up_is_linear_from_its_first_part_and_then_constant():
    optimizer = make_optimizer(learning_rate=0.8, warmup_steps=4, eps=0.0, max_grad_norm=1e9)
    params = {"w": jnp.zeros(1)}
    state, rates = optimizer.init(params), []
    for _ in range(6):  # a constant gradient's Adam update is exactly the learning rate
        updates, state = optimizer.update({"w": jnp.ones(1)}, state, params)
        rates.append(-float(updates["w"][0]))
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rtol=1e-4)


def test_without_warm_up_the_first_update_is_whole():
    optimizer = make_optimizer(learning_rate=0.8, eps=0.0)
    updates, _ = optimizer.update(
        {"w": jnp.ones(1)}, optimizer.init({"w": jnp.zeros(1)}), {"w": jnp.zeros(1)}
    )
    np.testing.assert_allclose(updates["w"], -0.8, rtol=1e-5)


def test_clipping_bounds_the_gradient_and_reports_its_norm_before():
    def moments(max_grad_norm):
        state, log = run(Method(), make_optimizer(max_grad_norm=max_grad_norm), updates=1)
        adam = next(s for s in jax.tree.leaves(
            state.opt_state, is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState)
        ) if isinstance(s, optax.ScaleByAdamState))
        return float(optax.tree.norm(adam.mu)) / 0.1, float(log[0]["grad_norm"])

    free, norm = moments(1e9)
    assert free == pytest.approx(norm, rel=1e-5)
    clipped, reported = moments(norm / 3)
    assert clipped == pytest.approx(norm / 3, rel=1e-5)
    assert reported == pytest.approx(norm, rel=1e-6)


def test_weight_decay_pulls_every_leaf_toward_zero():
    still, _ = run(Method(), make_optimizer(), updates=1)
    pulled, _ = run(Method(), make_optimizer(weight_decay=0.5), updates=1)
    start = make_state(make_optimizer()).student
    want = jax.tree.map(lambda s, p: s - 1e-2 * 0.5 * p, still.student, start)
    assert_close(pulled.student, want, 1e-6)


def test_ema_teacher_follows_the_updated_student():
    optimizer = make_optimizer()
    start = make_state(optimizer)
    state, _ = run(Method(ema_decay=0.75), optimizer, updates=1)
    want = jax.tree.map(lambda t, s: 0.75 * t + 0.25 * s, start.teacher, state.student)
    assert_close(state.teacher, want, 1e-7)
    frozen, _ = run(Method(ema_decay=1.0), optimizer)
    assert equal(frozen.teacher, start.teacher)
    copied, _ = run(Method(ema_decay=0.0), optimizer)
    assert equal(copied.teacher, copied.student)


def test_frozen_teacher_stays_as_initialised():
    optimizer = make_optimizer()
    state, log = run(Method(teacher="frozen"), optimizer)
    start = make_state(optimizer)
    assert equal(state.teacher, start.teacher) and not equal(state.student, start.student)
    _, ema = run(Method(ema_decay=0.0), optimizer)
    assert log[0]["loss"] == ema[0]["loss"] and log[2]["loss"] != ema[2]["loss"]


def test_live_teacher_is_the_student_of_this_very_step():
    optimizer = make_optimizer()
    state = make_state(optimizer)
    other = state.replace(teacher=jax.tree.map(jnp.zeros_like, state.teacher))
    _, live = run(Method(teacher="live"), optimizer, state=other)
    # An EMA of decay 0 equals the student at every update, too.
    _, copied = run(Method(ema_decay=0.0), optimizer)
    for got, want in zip(live, copied, strict=True):
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-6)


def test_the_untuned_teacher_is_the_base_whatever_was_trained():
    optimizer = make_optimizer()
    state = make_state(optimizer)
    nothing = state.replace(teacher=jax.tree.map(jnp.zeros_like, state.teacher))
    _, zero = run(Method(teacher="frozen"), optimizer, state=nothing)
    _, untuned = run(Method(teacher="untuned"), optimizer, state=state)
    _, frozen = run(Method(teacher="frozen"), optimizer, state=make_state(optimizer))
    for got, want in zip(untuned, zero, strict=True):
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-6)
    assert abs(frozen[0]["loss"] / untuned[0]["loss"] - 1) > 1e-3


def test_full_fine_tuning_moves_every_parameter():
    optimizer = make_optimizer()
    state, log = run(Method(trainable="full", ema_decay=0.9), optimizer, updates=2)
    names = trees.flatten(base())
    assert set(trees.flatten(state.student)) == set(names)
    for name, start in names.items():
        for tree in (state.student, state.teacher):
            assert np.any(trees.flatten(tree)[name] != start), name
    assert all(np.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in log)


def test_lora_training_lowers_the_loss_and_never_touches_the_base():
    before = jax.tree.map(np.array, base())
    optimizer = make_optimizer()
    step = jitted(Method(teacher="frozen"), optimizer)
    state, losses = make_state(optimizer), []
    for _ in range(60):
        state, metrics = step(state, {"params": base()}, make_batch(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert equal(before, base())


def test_the_lora_scale_is_alpha_over_rank():
    optimizer = make_optimizer()
    state = make_state(optimizer)
    halved = state.replace(**{
        role: lora.scaled(getattr(state, role), 0.5) for role in ("student", "teacher")
    })
    _, one = run(Method(lora_scale=1.0), optimizer, 1, state)
    _, two = run(Method(lora_scale=2.0), optimizer, 1, halved)
    _, other = run(Method(lora_scale=2.0), optimizer, 1, state)
    np.testing.assert_allclose(one[0]["loss"], two[0]["loss"], rtol=1e-6)
    assert abs(other[0]["loss"] / one[0]["loss"] - 1) > 1e-3


def test_the_state_is_donated_and_the_base_is_not():
    optimizer = make_optimizer()
    state, frozen = make_state(optimizer), {"params": base()}
    step = jax.jit(
        train_step.make_train_step(Method(), optimizer, train_step.dopsd(Method(), velocity)),
        donate_argnums=0,
    )
    new, _ = step(state, frozen, make_batch(0))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.student, state.teacher)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))
    again, _ = step(new, frozen, make_batch(1))
    assert int(again.step) == 2


def test_a_fresh_state_shares_no_buffer_between_student_and_teacher():
    state = make_state(make_optimizer())
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state.student, state.teacher))]
    assert len(set(pointers)) == len(pointers)
    assert equal(state.student, state.teacher) and int(state.step) == 0


def test_updates_count_and_repeat_exactly():
    optimizer = make_optimizer()
    first, log = run(Method(), optimizer)
    second, again = run(Method(), optimizer)
    assert int(first.step) == 3 and first.step.dtype == jnp.int32
    assert equal(first.student, second.student) and equal(log, again)
    assert equal(jax.random.key_data(first.rng), jax.random.key_data(jax.random.key(5)))
    assert set(log[0]) == {"loss", "step_loss", "grad_norm", "update_norm"}
    np.testing.assert_allclose(log[0]["loss"], log[0]["step_loss"].mean(), rtol=1e-6)


def test_noise_is_a_function_of_key_and_step():
    def noise(seed, step):
        return np.asarray(train_step.draw_noise(jax.random.key(seed), step, (4, 16, 16, 8)))

    first = noise(0, 3)
    np.testing.assert_array_equal(first, noise(0, jnp.int32(3)))
    assert np.any(first != noise(0, 4)) and np.any(first != noise(1, 3))
    assert first.dtype == np.float32
    assert abs(first.mean()) < 0.05 and abs(first.std() - 1) < 0.05


@pytest.mark.parametrize(
    "option,message",
    [
        ({"trainable": "some"}, r"trainable: expected one of \('lora', 'full'\), got 'some'"),
        ({"teacher": "old"},
         r"teacher: expected one of \('ema', 'frozen', 'live', 'untuned'\), got 'old'"),
        ({"loss": "l1"}, r"loss: expected one of \('x0', 'velocity'\), got 'l1'"),
        ({"ema_decay": 1.5}, r"ema_decay: expected a number in \[0, 1\], got 1\.5"),
        ({"ema_decay": float("nan")}, r"ema_decay: expected a number in \[0, 1\], got nan"),
        ({"accumulation": 0}, r"accumulation: expected at least 1, got 0"),
    ],
)
def test_unknown_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        Method(**option)


def test_an_average_with_warm_up_forgets_its_start():
    method, optimizer = Method(ema_decay=0.999, ema_warmup=True), make_optimizer()
    state = make_state(optimizer)
    want = jax.tree.map(jnp.copy, state.student)
    for n, decay in enumerate([1 / 10, 2 / 11, 3 / 12]):
        state, _ = jitted(method, optimizer)(state, {"params": base()}, make_batch(n))
        want = jax.tree.map(lambda w, s, d=decay: d * w + (1 - d) * s, want, state.student)
    assert_close(state.teacher, want, 1e-6)
