"""The Qwen3 text encoder, computed only up to the deepest layer whose output is used.

Source: transformers `Qwen3Model` and the text_encoder folders of Z-Image and FLUX.2-klein.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core.checks import COUNT, POSITIVE, check_shapes, value_problems
from dopsd_jax.models.attention import attention
from dopsd_jax.models.layers import Dense, Dtype, ParamNames, RMSNorm, parameter
from dopsd_jax.models.rope import rotate_half

NAMES = ParamNames(
    columns=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), rows=("o_proj", "down_proj")
)
STACKS = ("layers",)


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Architecture numbers, as config.json has them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float

    @classmethod
    def qwen3_4b(cls) -> Qwen3Config:
        """Qwen3-4B, the encoder of Z-Image and FLUX.2-klein-4B: 4,022,468,096 parameters."""
        return cls(151936, 2560, 9728, 36, 32, 8, 128, 1e-6, 1e6)

    @classmethod
    def qwen3_8b(cls) -> Qwen3Config:
        """Qwen3-8B, the encoder of FLUX.2-klein-9B: 8,190,735,360 parameters with its head."""
        return cls(151936, 4096, 12288, 36, 32, 8, 128, 1e-6, 1e6)

    @classmethod
    def from_json(cls, values: dict) -> Qwen3Config:
        """From a text_encoder/config.json.

        Raises:
            ValueError: Every missing or impossible value and every feature that this port lacks,
                together.
        """
        names = {
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
        }
        fields = [f.name for f in dataclasses.fields(cls) if f.name != "rope_theta"]
        kinds = {names.get(f, f): POSITIVE if f == "rms_norm_eps" else COUNT for f in fields}
        given = {k: v for k, v in values.items() if v is not None}
        wrong = value_problems(given, kinds)
        problems = list(wrong.values())
        heads, groups = (given.get(names[f]) for f in ("num_heads", "num_kv_heads"))
        if not wrong.keys() & {names["num_heads"], names["num_kv_heads"]} and heads % groups:
            problems.append(
                f"num_attention_heads: expected a multiple of num_key_value_heads = {groups}, got "
                f"{heads}"
            )
        if "head_dim" not in wrong and given["head_dim"] % 2:
            problems.append(f"head_dim: expected an even number, got {given['head_dim']}")
        if values.get("model_type", "qwen3") != "qwen3":
            problems.append(f"model_type: expected 'qwen3', got {values['model_type']!r}")
        for key, supported in (
            ("attention_bias", False), ("use_sliding_window", False), ("hidden_act", "silu"),
        ):
            if values.get(key, supported) != supported:
                problems.append(f"{key}: only {supported!r} is supported, got {values[key]!r}")
        others = [t for t in values.get("layer_types") or () if t != "full_attention"]
        if others:
            problems.append(f"layer_types: only 'full_attention' is supported, got {others}")
        theta, rope_problems = rope_theta(values)
        if problems := problems + rope_problems:
            raise ValueError("Qwen3 config: " + "; ".join(problems))
        return cls(**{f: values[names.get(f, f)] for f in fields}, rope_theta=theta)


def rope_theta(values: dict) -> tuple[float, list[str]]:
    """The rope base of a transformers config in any of its spellings, and what is wrong with it.

    A config without a base is a problem, not a default: transformers would silently take 1e4.
    """
    rope, problems = rope_values(values)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"rope_type: only 'default' is supported, got {kind!r}")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    if theta is None:
        problems.append("rope_theta: found neither rope_theta nor rope_parameters.rope_theta")
    elif wrong := value_problems({"rope_theta": theta}, {"rope_theta": POSITIVE}):
        return None, problems + list(wrong.values())
    return theta if theta is None else float(theta), problems


def rope_values(values: dict) -> tuple[dict, list[str]]:
    """What a transformers config says about rope in either place, and what is wrong with that."""
    rope, problems = {}, []
    for key in ("rope_scaling", "rope_parameters"):
        given = values.get(key) or {}
        if isinstance(given, dict):
            rope |= given
        else:
            problems.append(f"{key}: expected a JSON object or null, got {given!r:.60}")
    return rope, problems


def inverse_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta^(-2j / d), float32 [d / 2], rounded where torch rounds."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1.0) / np.float32(theta) ** exponents


class Attention(nn.Module):
    config: Qwen3Config
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, mask, cos, sin) -> jax.Array:
        c = self.config

        def project(name, heads):
            y = Dense(heads * c.head_dim, use_bias=False, dtype=self.dtype, name=name)(x)
            return y.reshape(*y.shape[:2], heads, c.head_dim)

        def norm(y, name):
            return RMSNorm(c.rms_norm_eps, self.dtype, name=name)(y)

        q = rotate_half(norm(project("q_proj", c.num_heads), "q_norm"), cos, sin)
        k = rotate_half(norm(project("k_proj", c.num_kv_heads), "k_norm"), cos, sin)
        out = attention(q, k, project("v_proj", c.num_kv_heads), mask=mask)
        out = out.reshape(*out.shape[:2], -1)  # K d, wider than D in the 4B model
        return Dense(c.hidden_size, use_bias=False, dtype=self.dtype, name="o_proj")(out)


class MLP(nn.Module):
    config: Qwen3Config
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(features, name):
            return Dense(features, use_bias=False, dtype=self.dtype, name=name)

        gate = nn.silu(dense(self.config.intermediate_size, "gate_proj")(x))
        up = dense(self.config.intermediate_size, "up_proj")(x)
        return dense(self.config.hidden_size, "down_proj")(gate * up)


class Layer(nn.Module):
    """One decoder layer; the carry also holds the taps recorded so far."""

    config: Qwen3Config
    dtype: Dtype

    @nn.compact
    def __call__(self, carry, index, mask, cos, sin, tap_depths, deepstack):
        x, recorded = carry
        eps = self.config.rms_norm_eps
        h = RMSNorm(eps, self.dtype, name="input_layernorm")(x)
        x = x + Attention(self.config, self.dtype, name="self_attn")(h, mask, cos, sin)
        h = RMSNorm(eps, self.dtype, name="post_attention_layernorm")(x)
        x = x + MLP(self.config, self.dtype, name="mlp")(h)
        recorded = record(recorded, tap_depths == index + 1, x)
        if deepstack is not None:
            last = deepstack.shape[0] - 1
            x = jnp.where(index <= last, x + deepstack[jnp.minimum(index, last)], x)
        return (x, recorded), None


def record(recorded: jax.Array, hit: jax.Array, x: jax.Array) -> jax.Array:
    """Writes x [B, L, D] into the rows of recorded [T, B, L, D] where hit [T] is True."""
    return jnp.where(hit[:, None, None, None], x, recorded)


class Qwen3(nn.Module):
    """The first `depth` decoder layers, without final norm and head.

    Params: `embed_tokens [V, D]` and `layers`, stacked on a leading axis of `depth`.
    """

    config: Qwen3Config
    depth: int
    dtype: Dtype = jnp.float32

    def setup(self):
        c = self.config
        if not 1 <= self.depth <= c.num_layers:
            raise ValueError(f"Qwen3: expected a depth of 1 to {c.num_layers}, got {self.depth}")
        self.embed_tokens = parameter(
            self, "embed_tokens", nn.initializers.normal(0.02), c.vocab_size, c.hidden_size
        )
        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * 5),
            length=self.depth,
            check_constancy_invariants=False,  # see layers.scan_layers
        )
        self.layers = scanned(c, self.dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token ids int32 [B, L] -> embeddings [B, L, D] in `dtype`."""
        return self.embed_tokens[ids].astype(self.dtype)

    def __call__(
        self, ids: jax.Array, mask: jax.Array, taps: Sequence[int] | None = None
    ) -> jax.Array:
        """Features of text; token i sits at position i, padded or not.

        Args:
            ids: int32 [B, L].
            mask: bool [B, L], True = real token. Features of pads are computed too: they see the
                real tokens before them.
            taps: Depths k, 1 to `depth`; None is (depth,). transformers calls tap k
                `hidden_states[k]`, except that its last entry is normed.

        Returns:
            [B, L, len(taps) D] in `dtype`, the taps side by side on the last axis.
        """
        check_shapes("Qwen3", ids=(ids, "B L"), mask=(mask, "B L"))
        freqs = inverse_frequencies(self.config.head_dim, self.config.rope_theta)
        angles = jnp.arange(ids.shape[1], dtype=jnp.float32)[:, None] * jnp.asarray(freqs)
        angles = jnp.broadcast_to(angles, (ids.shape[0], *angles.shape))
        return self.run(self.embed(ids), mask, angles, taps)

    def run(
        self,
        embeddings: jax.Array,
        mask: jax.Array,
        angles: jax.Array,
        taps: Sequence[int] | None = None,
        deepstack: jax.Array | None = None,
    ) -> jax.Array:
        """The decoder layers alone, for any embeddings and positions.

        Args:
            embeddings: [B, L, D].
            mask: bool [B, L], True = real token; attention is causal besides.
            angles: float32 [B, L, d / 2], rotary angles.
            taps: As in `__call__`.
            deepstack: [S, B, L, D] or None; entry k is added to the residual stream after layer
                k (counted from 0), behind tap k + 1.

        Returns:
            [B, L, len(taps) D] in `dtype`.

        Raises:
            ValueError: Shapes that do not fit, or a tap beyond `depth`.
        """
        c = self.config
        check_shapes(
            "Qwen3.run", embeddings=(embeddings, f"B L {c.hidden_size}"), mask=(mask, "B L"),
            angles=(angles, f"B L {c.head_dim // 2}"), deepstack=(deepstack, "S B L D"),
        )
        taps = (self.depth,) if taps is None else tuple(taps)
        if not taps or not all(1 <= k <= self.depth for k in taps):
            raise ValueError(
                f"Qwen3: expected taps from 1 to {self.depth}, the depth this encoder was built "
                f"with, got {taps}"
            )
        L = embeddings.shape[1]
        visible = jnp.tril(jnp.ones((L, L), bool)) & mask[:, None, :]
        cos, sin = jnp.cos(angles).astype(self.dtype), jnp.sin(angles).astype(self.dtype)
        x = embeddings.astype(self.dtype)
        # A buffer of the taps alone: stacking every layer's output would hold `depth` of them.
        recorded = jnp.zeros((len(taps), *x.shape), x.dtype)
        if deepstack is not None:
            deepstack = deepstack.astype(self.dtype)
        (_, recorded), _ = self.layers(
            (x, recorded), jnp.arange(self.depth), visible, cos, sin, jnp.asarray(taps), deepstack
        )
        return jnp.concatenate(list(recorded), axis=-1)
