"""Layers shared by all networks. Weights keep their stored dtype, compute runs in `dtype`.

`Dense` is where LoRA and other adapters enter: what the variable collection "lora" holds at its
path changes its output, see models/adapters.py. The network itself never learns who provides it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.errors import ScopeParamShapeError
from jax.ad_checkpoint import checkpoint_name

from dopsd_jax.core import sharding, trees
from dopsd_jax.models import adapters, attention, quantization

Dtype = jnp.dtype
INPUT = "layer_input"  # of what a rematerialised layer may keep elsewhere, see REMAT_POLICIES


def parameter(module: nn.Module, name: str, init: Callable[..., jax.Array], *shape: int) -> Any:
    """A parameter as `module.param` gives it, without tracing the initialiser where it is there.

    Flax traces it each time, to compare shapes, though most programs only read parameters: nothing
    else was done as often while a network was traced.

    Args:
        module: The bound module whose parameter it is.
        name: Of the parameter.
        init: (key, shape) -> float32 of that shape.
        *shape: Of the parameter, without the axes over which layers are stacked.

    Raises:
        flax.errors.ScopeParamShapeError: The parameter has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value = module.get_variable("params", name)
    found = jax.tree.leaves(value)[0].shape  # of a quantised kernel its values come first
    if found != shape:
        raise ScopeParamShapeError(name, "/".join(module.path), found, shape)
    return value


class Dense(nn.Module):
    """Affine map of the last axis, [.., in] -> [.., features], with an optional adapter.

    Params: `kernel [in, features]`, an array or as models/quantization.py has it, and
    `bias [features]` if `use_bias`. Collection "lora", optional:
    the leaves of models/adapters.py, such as `a [in, r]`, `b [r, features]`; alpha / rank must
    already stand in them (see lora.scaled). Where weights are split over a mesh, each is gathered
    here, in `dtype`.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(
            self, "kernel", nn.initializers.lecun_normal(), x.shape[-1], self.features
        )
        # One matrix product over all rows: on CPU its gradient is 1.6 times as fast as with [B, N].
        leading = x.shape[:-1]
        x = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = quantization.product(x, self._whole("kernel", kernel))
        if adapter := self.variables.get("lora"):
            leaves = trees.flatten(unfreeze(adapter))
            y = adapters.adapted(x, y, {n: self._whole(n, w) for n, w in leaves.items()})
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, self.features)
            y = y + bias.astype(self.dtype)
        # The sum is named: of two products a policy by primitives would keep both.
        return checkpoint_name(y.reshape(*leading, self.features), self.name or "dense")

    def _whole(self, name: str, w: quantization.Kernel) -> quantization.Kernel:
        name = "/".join((*self.path, name))
        if quantization.is_quantised(w):  # what is moved is quantised
            return jax.tree.map(lambda part: sharding.all_gather_param(name, part), w)
        return sharding.all_gather_param(name, w.astype(self.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, variance in float32.

    The normalised value is rounded to `dtype` before the multiplication, as in diffusers and
    transformers (torch.nn.RMSNorm multiplies first: differs in bfloat16 only).
    """

    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1])
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
            scale = parameter(self, "scale", nn.initializers.ones, width)
            bias = parameter(self, "bias", nn.initializers.zeros, width)
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


@dataclasses.dataclass(frozen=True)
class ParamNames:
    """What a network calls its linears and parameters, by what is done with them.

    Attributes:
        columns, rows, whole: Where they lie on a mesh, see `sharding.add_names`.
        matmuls: Linears of the blocks whose outputs the remat policy "matmuls" keeps: all but the
            last of attention and of MLPs.
        last: Those, and what modulates: "linears" keeps these too. They count where a norm follows,
            whose gradient needs what went in.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    matmuls: tuple[str, ...] = ()
    last: tuple[str, ...] = ()


# What brings a whole weight into being: a policy that keeps any of these values, the cast before
# the gather included, keeps a whole weight per layer.
WEIGHT_PRIMITIVES = (
    "sharding_constraint", "custom_vjp_call", "custom_vjp_call_jaxpr", "convert_element_type",
    "name", "dynamic_slice", "squeeze", "optimization_barrier",
)


def _all_but_weights(prim, *_, **__) -> bool:
    return prim.name not in WEIGHT_PRIMITIVES


def _linears(prim, *inputs, **params) -> bool:
    """Products of linear layers, which flatten their rows; not that of `rotate_interleaved`."""
    plain = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(prim, *inputs, **params)
    return plain and inputs[0].ndim == 2


# What a rematerialised layer keeps for its backward pass, from least memory to least compute.
# "full" recomputes everything from the layer's input, "offload" does so from an input that waits in
# the host's memory; "attention" keeps attention's output, "matmuls" also the inputs of attention
# and of the MLP's second half, "linears" what every linear layer gives, "dots" that too, but
# products with base and with LoRA apart, "activations" all but gathered weights; "none" unrolls the
# layers and keeps all.
REMAT_POLICIES: dict[str, Callable | tuple[str, ...] | None] = {
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[INPUT],
        offload_src="device", offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": (),  # attention's output, and the linears of these fields of ParamNames
    "matmuls": ("matmuls",),
    "linears": ("matmuls", "last"),
    "dots": _linears,
    "activations": _all_but_weights,
    "none": None,
}


def _placed(layer: type[nn.Module]) -> type[nn.Module]:
    """The layer, whose input has a name; on a mesh it holds its variables back until that is there.
    """
    class Placed(layer):
        @nn.compact
        def __call__(self, x, *args):
            x = jax.tree.map(lambda part: checkpoint_name(part, INPUT), x)
            if jax.sharding.get_abstract_mesh().empty or self.is_initializing():
                return layer.__call__(self, x, *args)
            x = sharding.split_rows(x)

            def hold(variables):
                nonlocal x
                x, variables = sharding.barrier(x, variables)
                return variables

            def run(module, *args):
                return layer.__call__(module, x, *args)

            held = nn.map_variables(run, ("params", "lora"), hold)
            return held(self, *args)

    return functools.wraps(layer, updated=())(Placed)


def scan_layers(
    layer: type[nn.Module], length: int, remat: str, names: ParamNames, num_broadcast: int
):
    """Stacks `length` copies of `layer` on a leading parameter axis and runs them by nn.scan.

    Args:
        layer: Module class whose __call__ is (carry, *broadcast) -> (carry, None).
        length: Number of layers.
        remat: A key of REMAT_POLICIES.
        names: Of the network, which say what some policies keep.
        num_broadcast: How many further arguments every layer sees unchanged.

    Returns:
        A module class; its params and "lora" leaves carry a leading axis of `length`.

    Raises:
        ValueError: Unknown remat policy.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat: expected one of {sorted(REMAT_POLICIES)}, got {remat!r}")
    layer, policy = _placed(layer), REMAT_POLICIES[remat]
    if isinstance(policy, tuple):
        kept = (name for field in policy for name in getattr(names, field))
        policy = jax.checkpoint_policies.save_only_these_names(attention.NAME, *kept)
    if policy is not None:
        layer = nn.remat(layer, policy=policy, prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * num_broadcast,
        length=length,
        # Small networks: a loop would copy each layer's weights and activations out of the stack.
        unroll=length if policy is None else 1,
        check_constancy_invariants=False,  # it traces every layer a second time
    )
