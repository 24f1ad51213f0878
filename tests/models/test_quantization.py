"""Quantised kernels: what they hold and stand for, and what a backward pass keeps of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import errors

from dopsd_jax.core import trees
from dopsd_jax.models import quantization
from dopsd_jax.models.layers import REMAT_POLICIES, Dense, ParamNames, parameter, scan_layers

# Appendix E of the QLoRA paper.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])
LAYERS, WIDTH = 3, 96


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_tiles(kernel, tile):
    """[in, out] -> [tiles, tile, out]."""
    return kernel.reshape(-1, tile, kernel.shape[1])


@pytest.mark.parametrize("kind", quantization.KINDS)
def test_a_kernel_is_rounded_to_the_nearest_of_its_tile(kind):
    kernel, tile = weights(WIDTH, 40), 32 if kind == "nf4" else WIDTH
    q = quantization.quantise(jnp.asarray(kernel), kind, jnp.float32)
    assert q.qvalue.dtype == {
        "int8": jnp.int8, "w8a8": jnp.int8, "nf4": jnp.uint4, "fp8": jnp.float8_e4m3fn,
    }[kind]
    assert q.scale.shape == (WIDTH // tile, 40)  # 96 is no multiple of 64, but of 32
    tiles = by_tiles(kernel, tile)
    largest = np.abs(tiles).max(1, keepdims=True)
    got = by_tiles(np.asarray(quantization.floats(q, jnp.float32)), tile)
    if kind in ("int8", "w8a8"):  # the largest lies halfway between two
        step = largest / 127.5
        assert np.all(np.abs(got - tiles) <= step / 2 * 1.0001)
        want = np.round(got / step) * step
    elif kind == "nf4":
        nearest = np.abs((tiles / largest)[..., None] - NF4).argmin(-1)
        want = NF4[nearest] * largest
    else:
        step = largest / 448
        want = np.asarray(jnp.asarray(tiles / step).astype(jnp.float8_e4m3fn), np.float32) * step
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_columns_that_no_tile_divides_have_one_scale():
    assert quantization.quantise(jnp.ones((170, 8)), "nf4").scale.shape == (1, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_levels_are_those_of_qwix(dtype):
    q = quantization.quantise(jnp.asarray(weights(2, WIDTH, 40)), "nf4", dtype)
    got, want = quantization.floats(q, dtype), qwix.dequantize(q)
    assert len(np.unique(np.asarray(q.qvalue))) == 16
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_the_layers_of_stacks_are_quantised_and_nothing_else():
    params = {
        "layers": {"to_q": {"kernel": jnp.ones((2, 64, 8)), "bias": jnp.ones((2, 8))},
                   "norm": {"scale": jnp.ones((2, 64))}},
        "x_embedder": {"kernel": jnp.ones((64, 8))},
    }
    flat = trees.flatten(quantization.quantise_tree(params, "int8"))
    assert [n for n, x in flat.items() if quantization.is_quantised(x)] == ["layers/to_q/kernel"]


def test_bytes_are_counted_by_bits():
    kernel = jnp.ones((4, 128, 256))
    for kind, bits in (("int8", 8), ("fp8", 8), ("nf4", 4)):
        q = jax.eval_shape(lambda x, kind=kind: quantization.quantise(x, kind), kernel)
        assert trees.num_bytes(q.qvalue) == 4 * 128 * 256 * bits // 8


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.silu(Dense(WIDTH, dtype=x.dtype, name="to_q")(x)), None


def network(remat):
    names = ParamNames(columns=("to_q",))
    return scan_layers(Layer, LAYERS, remat, names, 0)()


def variables(kind=""):
    params = {"to_q": {"kernel": jnp.asarray(weights(LAYERS, WIDTH, WIDTH) / WIDTH**0.5),
                       "bias": jnp.asarray(weights(LAYERS, WIDTH, seed=1))}}
    lora = {"to_q": {"a": jnp.asarray(weights(LAYERS, WIDTH, 4, seed=2)),
                     "b": jnp.asarray(weights(LAYERS, 4, WIDTH, seed=3)) / WIDTH}}
    quantised = quantization.quantise_tree(params, kind, jnp.float32) if kind else params
    return quantised, lora


def loss(lora, params, x, remat):
    y, _ = network(remat).apply({"params": params, "lora": lora}, x)
    return jnp.sum(y**2)


@pytest.mark.parametrize("kind", [k for k in quantization.KINDS if k != quantization.W8A8])
def test_gradients_are_those_of_what_the_kernels_stand_for(kind):
    quantised, lora = variables(kind)
    floats = jax.tree.map(lambda x: quantization.floats(x, jnp.float32), quantised,
                          is_leaf=quantization.is_quantised)
    x = jnp.asarray(weights(2, 5, WIDTH, seed=4))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)), static_argnums=3)
    got, want = run(lora, quantised, x, "full"), run(lora, floats, x, "full")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5), got, want)


def test_products_of_integers_round_every_row_and_not_the_gradient():
    x, kernel = weights(5, WIDTH) * np.float32([[1], [10], [0.1], [3], [0]]), weights(WIDTH, 40)
    q = quantization.quantise(jnp.asarray(kernel), "w8a8", jnp.float32)
    rounded = np.asarray(qwix.dequantize(qwix.quantize(x, jnp.int8, channelwise_axes=(0,))))
    largest = np.abs(x).max(1, keepdims=True)
    assert np.all(np.abs(rounded - x) <= largest / 127.5 / 2 * 1.0001)
    values = np.asarray(quantization.floats(q, jnp.float32))
    got = jax.jit(quantization.product)(jnp.asarray(x), q)
    np.testing.assert_allclose(got, rounded @ values, rtol=1e-5, atol=1e-5)
    assert np.abs(got - x @ values).max() > 1e-3  # it is not the product of floats
    lowered = jax.jit(quantization.product).lower(jnp.asarray(x), q).as_text()
    assert "(tensor<5x96xi8>, tensor<96x40xi8>) -> tensor<5x40xi32>" in lowered
    g = weights(5, 40, seed=1)
    _, backward = jax.vjp(lambda x: quantization.product(x, q), jnp.asarray(x))
    np.testing.assert_allclose(backward(jnp.asarray(g))[0], g @ values.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_no_policy_keeps_floats_of_a_quantised_kernel(remat, kind):
    quantised, lora = variables(kind)
    x = jnp.asarray(weights(1, 2, WIDTH, seed=4))

    def kept(params):
        _, backward = jax.vjp(lambda lora: loss(lora, params, x, remat), lora)
        # Without the arguments, which are there anyway.
        return [
            leaf for leaf in jax.tree.leaves(backward) if leaf.dtype == jnp.float32
            and leaf.size >= WIDTH * WIDTH
            and not any(leaf is other for other in jax.tree.leaves(params))
        ]

    assert [leaf.shape for leaf in kept(quantised)] == []


def test_a_parameter_that_is_there_is_read_without_its_initialiser():
    shapes = []

    def init(key, shape):
        shapes.append(shape)
        return jnp.zeros(shape)

    class Product(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ parameter(self, "kernel", init, x.shape[-1], 40)

    x, kernel = weights(5, WIDTH), weights(WIDTH, 40)
    np.testing.assert_array_equal(Product().apply({"params": {"kernel": kernel}}, x), x @ kernel)
    assert not shapes
    Product().init(jax.random.key(0), x)
    assert shapes == [(WIDTH, 40)]


@pytest.mark.parametrize("kind", ["", "int8"])
def test_a_parameter_of_another_shape_or_none_is_refused(kind):
    x, kernel = weights(5, WIDTH), jnp.asarray(weights(WIDTH - 1, 40))
    if kind:
        kernel = quantization.quantise(kernel, kind)
    with pytest.raises(errors.ScopeParamShapeError, match=r"\(96, 40\), but .*\(95, 40\)"):
        Dense(40).apply({"params": {"kernel": kernel}}, x)
    with pytest.raises(errors.ScopeParamNotFoundError):
        Dense(40).apply({"params": {"bias": jnp.zeros(40)}}, x)
