"""What keeps the student near the untuned model: rows that keep, and the anchor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import assert_close, base, draw, equal, make_batch, make_optimizer, velocity

from dopsd_jax.method import lora, train_step
from dopsd_jax.method.train_step import Method

ROWS = 4


def student_of(method):
    """What a run begins with: a LoRA that changes nothing, or the weights themselves."""
    if method.trainable == "full":
        return base()
    return lora.init(jax.random.key(0), base(), [".*/kernel"], 2)


def updated(method, kept=None, updates=3):
    """The state after some updates, and their metrics."""
    optimizer = make_optimizer()
    state = train_step.init_state(
        jax.tree.map(jnp.copy, student_of(method)), optimizer, jax.random.key(5)
    )
    step = jax.jit(
        train_step.make_train_step(method, optimizer, train_step.dopsd(method, velocity))
    )
    log = []
    for i in range(updates):
        batch = make_batch(i).replace(kept=None if kept is None else jnp.asarray(kept))
        state, metrics = step(state, {"params": base()}, batch)
        log.append(metrics)
    return state, log


def gradient(method, kept=None, rows=slice(None)):
    """The gradient, and the metrics, of some rows of a batch, for a student that has moved."""
    batch = jax.tree.map(lambda x: x[rows] if x.ndim > 1 else x, make_batch(0))
    if kept is not None:
        batch = batch.replace(kept=jnp.asarray(kept)[rows])
    student = draw(student_of(method), 2)
    teacher = draw(student_of(method), 3)
    objective = train_step.dopsd(method, velocity)
    return objective(student, teacher, {"params": base()}, batch)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_nothing_moves_where_all_rows_keep(trainable):
    """The untuned model is its own teacher, whatever the data's teacher would say."""
    method = Method(trainable=trainable, keeps=True)
    state, log = updated(method, [True] * ROWS)
    assert all(m["loss"] == 0 and m["grad_norm"] == 0 for m in log)
    assert equal(state.student, student_of(method))
    assert_close(state.teacher, state.student, 1e-6)  # an average of equal numbers is rounded
    state, log = updated(method, [False] + [True] * (ROWS - 1))
    assert all(m["grad_norm"] > 0 for m in log) and not equal(state.student, student_of(method))


def test_a_mixed_batch_is_the_weighted_mean_of_both_kinds():
    keeps = Method(keeps=True)
    mixed, metrics = gradient(keeps, [False, False, False, True])
    learned, of_learned = gradient(Method(), rows=slice(0, 3))
    kept, of_kept = gradient(keeps, [True] * ROWS, rows=slice(3, 4))
    assert_close(mixed, jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, learned, kept), 1e-6)
    np.testing.assert_allclose(
        metrics["loss"], 0.75 * of_learned["loss"] + 0.25 * of_kept["loss"], rtol=1e-5
    )
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(kept))


def test_rows_that_do_not_keep_are_learned_from_as_ever():
    """A batch in which no row keeps gives the gradient of the method without any."""
    got, metrics = gradient(Method(keeps=True), [False] * ROWS)
    want, _ = gradient(Method())
    assert_close(got, want, 1e-6)
    assert metrics["loss_kept"] == 0 and metrics["loss_anchor"] == 0


def test_an_anchor_adds_its_weight_times_the_distance():
    plain, of_plain = gradient(Method())
    pulled, _ = gradient(Method(keeps=True), [True] * ROWS)
    for weight in (0.5, 80.0):
        got, metrics = gradient(Method(anchor=weight))
        assert_close(
            got, jax.tree.map(lambda x, y, w=weight: x + w * y, plain, pulled), 1e-5 * weight
        )
        np.testing.assert_allclose(metrics["loss_teacher"], of_plain["loss"], rtol=1e-5)
        parts = sum(metrics[f"loss_{name}"] for name in ("teacher", "anchor", "kept"))
        np.testing.assert_allclose(metrics["loss"], parts, rtol=1e-6)


def test_an_anchor_does_not_pull_rows_that_keep_twice():
    kept = [False, True, True, True]
    got, _ = gradient(Method(keeps=True, anchor=2.0), kept)
    anchored, _ = gradient(Method(anchor=2.0), rows=slice(0, 1))
    pulled, _ = gradient(Method(keeps=True), [True] * ROWS, rows=slice(1, 4))
    assert_close(got, jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, anchored, pulled), 1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_may_hold_one_kind_alone(parts):
    kept = [False, False, True, True]
    whole, metrics = gradient(Method(keeps=True, anchor=0.5), kept)
    split, of_split = gradient(Method(keeps=True, anchor=0.5, accumulation=parts), kept)
    assert_close(split, whole, 1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(of_split[name], value, rtol=1e-5, err_msg=name)


def test_earlier_loras_add_to_the_one_that_trains():
    """As if they were in the weights; their ranks stand before the new one's."""
    method = Method()
    trained, earlier = (draw(student_of(method), seed, 0.3) for seed in (2, 7))
    merged = lora.merge(base(), earlier, 1.0)
    batch = make_batch(0)

    def drawn(base):
        return velocity(method.assemble(base, trained), batch.noise, 0.5, batch.student_ctx)

    want = drawn({"params": merged})
    np.testing.assert_allclose(
        drawn({"params": base(), "lora": earlier}), want, atol=1e-5 * float(np.abs(want).max())
    )
    assert np.abs(drawn({"params": base()}) - want).max() > 0.1
    objective = train_step.dopsd(method, velocity)
    got, _ = objective(trained, trained, {"params": base(), "lora": earlier}, batch)
    folded, _ = objective(trained, trained, {"params": merged}, batch)
    assert_close(got, folded, 1e-5)


def test_the_untuned_model_is_without_earlier_loras():
    """With an earlier LoRA in place, rows that keep pull back to what was before it."""
    method = Method(keeps=True)
    earlier, untouched = draw(student_of(method), 7, 0.3), student_of(method)
    objective = train_step.dopsd(method, velocity)
    batch = make_batch(0).replace(kept=jnp.ones(ROWS, bool))
    base_ = {"params": base()}
    _, metrics = objective(untouched, untouched, base_ | {"lora": earlier}, batch)
    _, without = objective(untouched, untouched, base_, batch)
    assert metrics["loss"] > 1e-3 and without["loss"] == 0


def test_going_on_from_a_lora_changes_nothing_at_first():
    fresh = lora.init(jax.random.key(1), base(), [".*/kernel"], 4)
    first = draw(lora.init(jax.random.key(0), base(), [".*/kernel"], 2), 2)
    tree = lora.continued(lora.scaled(first, 3.0), fresh, 0.5)
    assert lora.max_rank(tree) == 4
    for (path, a, b), (_, a0, b0) in zip(lora.pairs(tree), lora.pairs(first), strict=True):
        np.testing.assert_allclose(0.5 * a @ b, 3.0 * a0 @ b0, atol=1e-5, err_msg=path)
        np.testing.assert_array_equal(b[2:], 0)
        assert np.abs(a[:, 2:]).max() > 0
    with pytest.raises(ValueError, match=r"mix has rank 4, lora.rank = 2 \(and|has rank 4"):
        lora.continued(fresh, first, 1.0)
    some = lora.init(jax.random.key(1), base(), ["mix/kernel"], 4)
    with pytest.raises(ValueError, match="out is not among lora.targets"):
        lora.continued(first, some, 1.0)


def test_weights_of_an_anchor_are_checked():
    with pytest.raises(ValueError, match="anchor: expected 0 or a number above it, got -1"):
        Method(anchor=-1)
    with pytest.raises(ValueError, match="anchor: expected 0"):
        Method(anchor=float("nan"))
