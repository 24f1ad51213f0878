"""Layers shared by all networks. Weights keep their stored dtype, compute runs in `dtype`.

`Dense` is where LoRA enters: if the variable collection "lora" holds `a` and `b` at its path,
their product is added. The network itself never learns who provides them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = jnp.dtype


class Dense(nn.Module):
    """Affine map of the last axis, [.., in] -> [.., features], with optional low-rank addition.

    Params: `kernel [in, features]`, `bias [features]` if `use_bias`. Collection "lora", optional:
    `a [in, r]`, `b [r, features]`; adds (x a) b, so alpha / rank must already stand in `b`
    (see lora.scaled).
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        # One matrix product over all rows: on CPU its gradient is 1.6 times as fast as with [B, N].
        leading = x.shape[:-1]
        x = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = x @ kernel.astype(self.dtype)
        if self.has_variable("lora", "a"):
            a = self.get_variable("lora", "a").astype(self.dtype)
            b = self.get_variable("lora", "b").astype(self.dtype)
            y = y + (x @ a) @ b
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y.reshape(*leading, self.features)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, variance in float32.

    The normalised value is rounded to `dtype` before the multiplication, as in diffusers and
    transformers (torch.nn.RMSNorm multiplies first: differs in bfloat16 only).
    """

    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis in float32; `scale` and `bias` only if `affine`."""

    eps: float
    affine: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (width,))
            bias = self.param("bias", nn.initializers.zeros, (width,))
            x = x * scale.astype(jnp.float32) + bias.astype(jnp.float32)
        return x.astype(self.dtype)


def sinusoid(t: jax.Array, width: int) -> jax.Array:
    """Sinusoidal features of times: [B] -> float32 [B, width], cosines, then sines.

    Frequencies fall from 1 to nearly 1e-4. They are rounded where torch rounds: at an angle of
    1000 the last bit of a frequency is 6e-5 in the feature.
    """
    half = width // 2
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / half
    freqs = np.exp(exponents, dtype=np.float64).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


# What a rematerialised layer keeps for its backward pass. "full" recomputes everything.
REMAT_POLICIES: dict[str, Callable | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": None,
}


def scan_layers(layer: type[nn.Module], length: int, remat: str, num_broadcast: int):
    """Stacks `length` copies of `layer` on a leading parameter axis and runs them by nn.scan.

    Args:
        layer: Module class whose __call__ is (carry, *broadcast) -> (carry, None).
        length: Number of layers.
        remat: A key of REMAT_POLICIES.
        num_broadcast: How many further arguments every layer sees unchanged.

    Returns:
        A module class; its params and "lora" leaves carry a leading axis of `length`.

    Raises:
        ValueError: Unknown remat policy.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat: expected one of {sorted(REMAT_POLICIES)}, got {remat!r}")
    if REMAT_POLICIES[remat] is not None:
        layer = nn.remat(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * num_broadcast,
        length=length,
        # Small networks: a loop would copy each layer's weights and activations out of the stack.
        unroll=length if REMAT_POLICIES[remat] is None else 1,
    )
