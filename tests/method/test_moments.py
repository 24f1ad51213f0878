"""AdamW's averages in int8: they follow float32, take a quarter, and are saved as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

from dopsd_jax.core import trees
from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.method import moments
from dopsd_jax.method.train_step import make_optimizer

SETTINGS = dict(
    learning_rate=1e-3, warmup_steps=0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0,
    max_grad_norm=1e9,
)
SHAPES = {"kernel": (96, 256), "a": (512, 8), "bias": (48,)}


def gradients(step):
    """Like those of a network: rows and columns whose sizes differ by powers of ten."""
    def one(i, shape):
        rng = np.random.default_rng(i)
        size = np.exp(sum(rng.standard_normal([n if a == axis else 1 for a, n in enumerate(shape)])
                          for axis in range(len(shape))))
        noise = np.random.default_rng((i, step)).standard_normal(shape)
        return jnp.asarray(1e-4 * size * (noise + rng.standard_normal(shape) / 2), jnp.float32)

    return {name: one(i, shape) for i, (name, shape) in enumerate(SHAPES.items())}


def run(optimizer, updates, start=0, before=None):
    """(what has moved, state) after some updates."""
    zeros = jax.tree.map(jnp.zeros_like, gradients(0))
    moved, state = before or (zeros, optimizer.init(zeros))
    update = jax.jit(optimizer.update)
    for step in range(start, start + updates):
        changes, state = update(gradients(step), state, zeros)
        moved = optax.apply_updates(moved, changes)
    return moved, state


def int8():
    return make_optimizer(**SETTINGS, moments_dtype="int8")


def distances(updates):
    want, _ = run(make_optimizer(**SETTINGS), updates)
    got, _ = run(int8(), updates)
    return {name: float(np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name]))
            for name in want}


def test_parameters_move_as_with_float32():
    found = distances(60)
    assert found["bias"] == 0 and 0 < max(found.values()) < 0.08, found


def test_rounded_linearly_they_would_leap(monkeypatch):
    """Why roots are quantised."""
    monkeypatch.setattr(moments, "_quantise", lambda x, kind, _: qwix.quantize(
        x, jnp.int8, channelwise_axes=[0], calibration_method=kind
    ) if x.ndim > 1 else x)
    monkeypatch.setattr(moments, "_dequantise", lambda x: qwix.dequantize(x)
                        if isinstance(x, qwix.QArray) else x)
    assert distances(10)["kernel"] > 10


def test_they_take_little_more_than_a_quarter():
    shapes = {"kernel": jax.ShapeDtypeStruct((30, 512, 512), jnp.float32),
              "a": jax.ShapeDtypeStruct((30, 512, 64), jnp.float32)}
    wide, small = (
        trees.num_bytes(jax.eval_shape(make_optimizer(**SETTINGS, moments_dtype=kind).init, shapes))
        for kind in ("float32", "int8")
    )
    assert 0.25 < small / wide < 0.26


@pytest.mark.parametrize("shape,split,found", [
    ((30, 3840, 10240), 1, {2: 256}), ((30, 10240, 3840), 2, {1: 256}),
    ((30, 3840, 64), 1, {2: 64}), ((30, 64, 3840), 2, {1: 64}), ((8192,), None, {0: 256}),
    ((512, 8), 0, {1: 8, 0: 32}), ((1023, 1023), None, None), ((63, 64), None, None),
    ((), None, None),
])
def test_blocks_lie_along_the_axis_that_is_not_split(shape, split, found):
    assert moments.blocks(shape, split) == found


@pytest.mark.parametrize("kind", [moments.SIGNED, moments.POSITIVE])
def test_what_does_not_change_does_not_fade(kind):
    x = jnp.exp(jax.random.normal(jax.random.key(0), (64, 256)))
    again = jax.jit(lambda x: moments._dequantise(moments._quantise(x, kind)))
    once = many = again(x)
    for _ in range(200):
        many = again(many)
    np.testing.assert_allclose(many, once, rtol=1e-3)


def test_saved_and_read_again_they_go_on_bit_for_bit(tmp_path):
    optimizer = int8()
    want, _ = run(optimizer, 6)
    half = run(optimizer, 3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"moved": half[0], "opt_state": half[1]}, {})
    checkpoints.wait()
    like = {"moved": half[0], "opt_state": optimizer.init(half[0])}
    read, _ = checkpoints.restore(like)
    checkpoints.close()
    assert read["opt_state"][1][0].mu["kernel"].qvalue.dtype == jnp.int8
    got, _ = run(optimizer, 3, start=3, before=(read["moved"], read["opt_state"]))
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_of_muon_they_are_refused():
    with pytest.raises(ValueError, match="int8: expected optimizer adamw, got muon"):
        make_optimizer(**SETTINGS, moments_dtype="int8", optimizer="muon", stacks=["layers"])
