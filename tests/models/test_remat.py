"""Policies of rematerialisation: what a layer keeps for its backward pass is what they say."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from dopsd_jax.core import sharding, trees
from dopsd_jax.method import lora
from dopsd_jax.models import layers
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.weights.families import example, transformer_table
from dopsd_jax.weights.flux2 import FLUX2
from dopsd_jax.weights.names import stacks_of
from dopsd_jax.weights.shapes import transformer_shapes
from dopsd_jax.weights.z_image import Z_IMAGE
from dopsd_jax.weights.z_image_names import Z_IMAGE_TARGETS

CONFIG = ZImageConfig(
    in_channels=4, dim=48, n_layers=5, n_refiner_layers=1, n_heads=4, cap_feat_dim=32,
    axes_dims=(4, 4, 4), axes_lens=(256, 64, 64),
)
HOST = jax.memory.Space.Host
TOKENS = 32 + 32  # image, padded, and text
D, F = CONFIG.dim, CONFIG.mlp_dim


def kept(remat, monkeypatch, on_host=False):
    """(dtype, dims) -> how many such arrays wait for the backward pass of a LoRA's gradient, in the
    device's memory or in the host's.

    Weights come in float32 and are used in bfloat16, on a mesh that splits them all.
    """
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    network = ZImageTransformer(CONFIG, jnp.bfloat16, remat)
    params = transformer_shapes(network)
    low_rank = jax.eval_shape(
        lambda: lora.init(jax.random.key(0), params, Z_IMAGE_TARGETS["published"], 2)
    )
    mesh = AbstractMesh((1, 4, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)

    def residuals(params, low_rank):
        inputs = (jnp.zeros((4, 8, 8, 4)), jnp.zeros(4), jnp.zeros((4, 32, 32)),
                  jnp.ones((4, 32), bool))

        def f(low_rank):
            return network.apply({"params": params, "lora": low_rank}, *inputs)

        with jax.sharding.use_abstract_mesh(mesh):
            return jax.tree.leaves(jax.vjp(f, low_rank)[1])

    leaves = jax.make_jaxpr(residuals)(params, low_rank).out_avals
    return collections.Counter(
        (x.dtype.name, x.shape) for x in leaves if (x.memory_space == HOST) == on_host
    )


def of_tokens(found, width):
    """How many [layers, .., width] stacks of all tokens are kept."""
    return sum(n for (kind, dims), n in found.items() if kind == "bfloat16"
               and dims[0] == CONFIG.n_layers and dims[-1] == width and TOKENS in dims)


def of_heads(found):
    return sum(n for (_, dims), n in found.items()
               if dims == (CONFIG.n_layers, 4, TOKENS, CONFIG.n_heads, CONFIG.head_dim))


def weights(found):
    """How many stacks of whole bfloat16 kernels are kept."""
    kernels = {(D, D), (D, F), (F, D)}
    return sum(n for (kind, dims), n in found.items()
               if kind == "bfloat16" and dims[0] == CONFIG.n_layers and dims[1:] in kernels)


def test_full_keeps_the_input_of_each_layer_alone(monkeypatch):
    found = kept("full", monkeypatch)
    assert of_tokens(found, D) == 1 and of_tokens(found, F) == of_heads(found) == 0


def test_offload_keeps_the_input_of_each_layer_on_the_host(monkeypatch):
    assert of_tokens(kept("offload", monkeypatch), D) == 0
    found = kept("offload", monkeypatch, on_host=True)
    assert of_tokens(found, D) == 1 and of_tokens(found, F) == of_heads(found) == 0
    assert not kept("full", monkeypatch, on_host=True)


def test_offload_computes_what_full_does():
    def gradient(remat):
        network = ZImageTransformer(CONFIG, jnp.float32, remat)
        rng = jax.random.key(1)
        params = jax.tree.map(lambda x: 0.1 * jax.random.normal(rng, x.shape),
                              transformer_shapes(network))
        inputs = (jnp.ones((1, 8, 8, 4)), jnp.zeros(1), jnp.ones((1, 32, 32)),
                  jnp.ones((1, 32), bool))
        return jax.jit(jax.grad(
            lambda p: jnp.sum(jnp.square(network.apply({"params": p}, *inputs)))
        ))(params)

    for one, two in zip(*map(jax.tree.leaves, map(gradient, ("full", "offload"))), strict=True):
        np.testing.assert_array_equal(one, two)


def test_attention_keeps_its_output_too(monkeypatch):
    found = kept("attention", monkeypatch)
    assert of_tokens(found, D) == 1 and of_tokens(found, F) == 0 and of_heads(found) == 1


def test_matmuls_keeps_sums_of_base_and_lora_once(monkeypatch):
    found = kept("matmuls", monkeypatch)
    # The input, q, k, v as they leave their linears; w1 and w3; attention's output.
    assert of_tokens(found, D) == 4 and of_tokens(found, F) == 2 and of_heads(found) == 1
    assert weights(found) == 0


def test_linears_keeps_what_every_linear_gives(monkeypatch):
    found = kept("linears", monkeypatch)
    # Beside those of "matmuls", to_out and w2, which a norm follows, and the modulation.
    assert of_tokens(found, D) == 6 and of_tokens(found, F) == 2 and of_heads(found) == 1
    assert found["bfloat16", (CONFIG.n_layers, 4, 4 * D)] == 1 and weights(found) == 0


def test_dots_keeps_products_of_linears_and_no_other(monkeypatch):
    """That of the rotation's swap of neighbours, in float32, costs less than to keep it."""
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")  # where the swap is a product
    found = kept("dots", monkeypatch)
    assert found["bfloat16", (CONFIG.n_layers, 4 * TOKENS, F)] == 4 and of_heads(found) == 0
    plain = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    monkeypatch.setitem(layers.REMAT_POLICIES, "dots", plain)
    assert of_heads(kept("dots", monkeypatch)) == 2


def test_activations_keeps_no_whole_weight(monkeypatch):
    found = kept("activations", monkeypatch)
    assert of_tokens(found, F) >= 2 and weights(found) == 0


def test_a_policy_that_keeps_everything_keeps_whole_weights(monkeypatch):
    """What "activations" is for: without its exceptions every weight waits, whole."""
    everything = jax.checkpoint_policies.everything_saveable
    monkeypatch.setitem(layers.REMAT_POLICIES, "activations", everything)
    assert weights(kept("activations", monkeypatch)) >= 7


@pytest.mark.parametrize("remat", ["full", "matmuls"])
def test_no_policy_keeps_gathered_weights(monkeypatch, remat):
    assert weights(kept(remat, monkeypatch)) == 0


@pytest.mark.parametrize("family", [Z_IMAGE, FLUX2], ids=lambda f: f.pipeline)
def test_every_linear_of_the_blocks_is_kept_or_made_again_by_name(family):
    """What the policies keep by name are the network's own linears, none left out."""
    network = family.network(example(family), jnp.dtype("bfloat16"), "none")
    stacks = stacks_of(transformer_table(family.denoiser(network, 8)))
    named = {name.split("/")[-2] for name in trees.flatten(transformer_shapes(network))
             if name.split("/")[0] in stacks and name.endswith("/kernel")}
    assert {*family.names.matmuls, *family.names.last} == named
    assert not {*family.names.matmuls} & {*family.names.last}
