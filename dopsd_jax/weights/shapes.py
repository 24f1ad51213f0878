"""Parameter shapes of the networks, by tracing their initialisation: nothing is computed.

Every function returns a float32 tree of ShapeDtypeStruct that is not to be changed: tracing takes
longer than a small model's pictures, so what was found is kept.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dopsd_jax.core import trees
from dopsd_jax.models.qwen3 import Qwen3
from dopsd_jax.models.qwen3_vl import VisionTower
from dopsd_jax.models.vae import Vae


def transformer_shapes(network: nn.Module) -> trees.Tree:
    """Of a transformer, whatever its dtype and its policy of rematerialisation."""
    # The checks of a run and its step differ in these, and share one tracing.
    return _transformer_shapes(network.clone(dtype=jnp.dtype("float32"), remat="full"))


@functools.lru_cache(maxsize=8)
def _transformer_shapes(network: nn.Module) -> trees.Tree:
    return _shapes(network, *network.smallest_inputs())


@functools.lru_cache(maxsize=8)
def text_shapes(network: Qwen3) -> trees.Tree:
    """Of a text encoder."""
    ids = jnp.zeros((1, 8), jnp.int32)
    return _shapes(network, ids, ids > 0)


@functools.lru_cache(maxsize=8)
def vae_shapes(network: Vae) -> trees.Tree:
    """Of a VAE, encoder and decoder."""
    side = 8 * network.config.factor
    return _shapes(network, jnp.zeros((1, side, side, 3)))


@functools.lru_cache(maxsize=8)
def vision_shapes(network: VisionTower) -> trees.Tree:
    """Of Qwen3-VL's vision tower."""
    merge = network.config.spatial_merge_size
    return _shapes(network, jnp.zeros((1, merge * merge, network.config.patch_dim)), (merge, merge))


def _shapes(network: nn.Module, *inputs) -> trees.Tree:
    return jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs))["params"]
