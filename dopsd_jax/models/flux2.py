"""The FLUX.2 transformer (two streams, then one), numerically that of diffusers.

Time modulates all layers of a kind alike: its projections are computed once per evaluation and
shared. No layer has a bias, and no token is masked.

Source: diffusers `Flux2Transformer2DModel` and the tensors of FLUX.2-klein.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core.checks import check_shapes
from dopsd_jax.models.attention import attention
from dopsd_jax.models.layers import (
    Dense,
    Dtype,
    LayerNorm,
    ParamNames,
    RMSNorm,
    scan_layers,
    sinusoid,
)
from dopsd_jax.models.rope import axis_tables, gather_cos_sin, image_ids, rotate_interleaved

# Positions per axis. The checkpoint has no limit; 1024 are 16384 pixels a side and 102 references.
POSITIONS = 1024
TIME_SCALE = 1000.0
# The fused linears are split as any other: their columns are of two kinds. The last ones are added
# up as they are, without a norm, and the gates need them only if they train.
NAMES = ParamNames(
    columns=("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"),
    rows=("to_out", "to_add_out"),
    matmuls=("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "linear_in",
             "to_qkv_mlp_proj"),
    last=("to_out", "to_add_out", "linear_out"),
)

# What diffusers assumes for a key that config.json leaves out: the numbers of FLUX.2-dev.
DIFFUSERS_DEFAULTS = {
    "_class_name": "Flux2Transformer2DModel",
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "eps": 1e-6,
    "guidance_embeds": True,
}
IGNORED_KEYS = {"_diffusers_version", "_name_or_path"}


@dataclasses.dataclass(frozen=True)
class Flux2Config:
    """Architecture numbers, under their names in config.json.

    Attributes:
        num_layers, num_single_layers: Depths of the two-stream and the one-stream part.
        attention_head_dim, num_attention_heads: d and K; the width D is their product.
        joint_attention_dim: Width of the text features.
        in_channels: C, of image and reference tokens.
        axes_dims_rope: Rotated dims of the position axes (t, h, w, l); they sum to d.
    """

    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    joint_attention_dim: int
    in_channels: int = 128
    attention_head_dim: int = 128
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    eps: float = 1e-6

    @classmethod
    def klein_4b(cls) -> Flux2Config:
        """FLUX.2-klein-4B (and its base): 3,875,544,576 parameters."""
        return cls(5, 20, 24, 7680)

    @classmethod
    def klein_9b(cls) -> Flux2Config:
        """FLUX.2-klein-9B (and its base): 9,078,581,248 parameters."""
        return cls(8, 24, 32, 12288)

    @classmethod
    def from_json(cls, values: dict) -> Flux2Config:
        """From a diffusers transformer/config.json.

        Raises:
            ValueError: Every value that this port does not support, together.
        """
        full = {**DIFFUSERS_DEFAULTS, **values}
        expected = {
            "_class_name": "Flux2Transformer2DModel", "patch_size": 1, "guidance_embeds": False,
        }
        problems = []
        for key, want in expected.items():
            if full[key] != want:
                absent = "" if key in values else " (absent, the default of diffusers)"
                problems.append(f"{key}: expected {want!r}, got {full[key]!r}{absent}")
        if full["out_channels"] not in (None, full["in_channels"]):
            problems.append(f"out_channels: expected in_channels, got {full['out_channels']}")
        axes, head_dim = tuple(full["axes_dims_rope"]), full["attention_head_dim"]
        if len(axes) != 4 or sum(axes) != head_dim or any(dim % 2 for dim in axes):
            problems.append(
                f"axes_dims_rope: expected four even numbers that sum to attention_head_dim = "
                f"{head_dim}, got {list(axes)}"
            )
        if unknown := sorted(set(values) - set(DIFFUSERS_DEFAULTS) - IGNORED_KEYS):
            problems.append(f"unknown keys {unknown}")
        if problems:
            raise ValueError("FLUX.2 transformer config: " + "; ".join(problems))
        own = {f.name: full[f.name] for f in dataclasses.fields(cls)}
        return cls(**own | {"axes_dims_rope": axes})

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)


def dense(features: int, dtype: Dtype, name: str) -> Dense:
    return Dense(features, use_bias=False, dtype=dtype, name=name)


def swiglu(x: jax.Array) -> jax.Array:
    gate, value = jnp.split(x, 2, axis=-1)
    return nn.silu(gate) * value


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array, config: Flux2Config) -> jax.Array:
    """(1 + scale) norm(x) + shift; the norm has no parameters."""
    return (1 + scale) * LayerNorm(config.eps, affine=False, dtype=x.dtype)(x) + shift


class TimeEmbedding(nn.Module):
    """sigma [B] -> [B, D]: sinusoid of 1000 sigma in float32, then an MLP.

    Differs from reference: in bfloat16 the torch network rounds sigma and 1000 sigma to it first
    (967.38 becomes 968).
    """

    config: Flux2Config
    dtype: Dtype

    @nn.compact
    def __call__(self, sigma: jax.Array) -> jax.Array:
        c = self.config
        x = sinusoid(TIME_SCALE * sigma.astype(jnp.float32), c.timestep_guidance_channels)
        x = nn.silu(dense(c.dim, self.dtype, "linear_1")(x))
        return dense(c.dim, self.dtype, "linear_2")(x)


class JointAttention(nn.Module):
    """Attention of text and image over each other; each stream has projections of its own."""

    config: Flux2Config
    dtype: Dtype

    @nn.compact
    def __call__(self, text: jax.Array, image: jax.Array, cos, sin) -> tuple[jax.Array, jax.Array]:
        c = self.config

        def project(x, name, norm=None):
            y = dense(c.dim, self.dtype, name)(x)
            y = y.reshape(*y.shape[:2], c.num_attention_heads, c.attention_head_dim)
            return y if norm is None else RMSNorm(c.eps, self.dtype, name=norm)(y)

        def both(of_text, of_image, suffix=""):
            norms = (f"norm_added_{suffix}", f"norm_{suffix}") if suffix else (None, None)
            return jnp.concatenate(
                [project(text, of_text, norms[0]), project(image, of_image, norms[1])], axis=1
            )

        q = rotate_interleaved(both("add_q_proj", "to_q", "q"), cos, sin)
        k = rotate_interleaved(both("add_k_proj", "to_k", "k"), cos, sin)
        out = attention(q, k, both("add_v_proj", "to_v"))
        out = out.reshape(*out.shape[:2], c.dim)
        L = text.shape[1]
        return (
            dense(c.dim, self.dtype, "to_add_out")(out[:, :L]),
            dense(c.dim, self.dtype, "to_out")(out[:, L:]),
        )


class FeedForward(nn.Module):
    config: Flux2Config
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = swiglu(dense(2 * self.config.mlp_dim, self.dtype, "linear_in")(x))
        return dense(self.config.dim, self.dtype, "linear_out")(h)


class DoubleBlock(nn.Module):
    """Joint attention, then a feed-forward per stream; the carry is (text, image)."""

    config: Flux2Config
    dtype: Dtype

    @nn.compact
    def __call__(self, carry, text_mod, image_mod, cos, sin):
        c = self.config
        text, image = carry
        t_shift, t_scale, t_gate, t_shift_ff, t_scale_ff, t_gate_ff = jnp.split(text_mod, 6, -1)
        i_shift, i_scale, i_gate, i_shift_ff, i_scale_ff, i_gate_ff = jnp.split(image_mod, 6, -1)
        text_out, image_out = JointAttention(c, self.dtype, name="attn")(
            modulated(text, t_shift, t_scale, c), modulated(image, i_shift, i_scale, c), cos, sin
        )
        text, image = text + t_gate * text_out, image + i_gate * image_out
        h = modulated(image, i_shift_ff, i_scale_ff, c)
        image = image + i_gate_ff * FeedForward(c, self.dtype, name="ff")(h)
        h = modulated(text, t_shift_ff, t_scale_ff, c)
        text = text + t_gate_ff * FeedForward(c, self.dtype, name="ff_context")(h)
        return (text, image), None


class ParallelAttention(nn.Module):
    """Attention and feed-forward side by side, between one projection in and one out."""

    config: Flux2Config
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, cos, sin) -> jax.Array:
        c = self.config
        y = dense(3 * c.dim + 2 * c.mlp_dim, self.dtype, "to_qkv_mlp_proj")(x)
        *qkv, mlp = jnp.split(y, [c.dim, 2 * c.dim, 3 * c.dim], axis=-1)
        heads = (*x.shape[:2], c.num_attention_heads, c.attention_head_dim)
        q, k, v = (part.reshape(heads) for part in qkv)
        q = rotate_interleaved(RMSNorm(c.eps, self.dtype, name="norm_q")(q), cos, sin)
        k = rotate_interleaved(RMSNorm(c.eps, self.dtype, name="norm_k")(k), cos, sin)
        out = attention(q, k, v).reshape(x.shape)
        return dense(c.dim, self.dtype, "to_out")(jnp.concatenate([out, swiglu(mlp)], axis=-1))


class SingleBlock(nn.Module):
    """`ParallelAttention` over text and image as one sequence."""

    config: Flux2Config
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, mod, cos, sin) -> tuple[jax.Array, None]:
        shift, scale, gate = jnp.split(mod, 3, axis=-1)
        h = modulated(x, shift, scale, self.config)
        return x + gate * ParallelAttention(self.config, self.dtype, name="attn")(h, cos, sin), None


def text_ids(length: int) -> np.ndarray:
    """Positions (0, 0, 0, n) of text tokens: int32 [length, 4]."""
    return np.pad(np.arange(length, dtype=np.int32)[:, None], ((0, 0), (3, 0)))


class Flux2Transformer(nn.Module):
    """Predicts noise - data of a noised latent.

    Params hold stacked layers: `transformer_blocks` and `single_transformer_blocks` carry a
    leading axis.
    """

    config: Flux2Config
    dtype: Dtype = jnp.float32
    remat: str = "full"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        sigma: jax.Array,
        text: jax.Array,
        ref_tokens: jax.Array | None = None,
        ref_ids: jax.Array | None = None,
    ) -> jax.Array:
        """One evaluation.

        Args:
            x: [B, h, w, C] latents; one token each.
            sigma: float32 [B], 1 noise, 0 data.
            text: [B, L, joint_attention_dim] features. All are attended, those of pads too.
            ref_tokens: [B, M, C] clean latents of reference images, or None.
            ref_ids: int32 [B, M, 4] their positions, each below POSITIONS (see `image_ids`).

        Returns:
            [B, h, w, C] in `dtype`.

        Raises:
            ValueError: Shapes that do not fit, or more positions than POSITIONS.
        """
        c = self.config
        dims = check_shapes(
            "Flux2Transformer", x=(x, f"B h w {c.in_channels}"), sigma=(sigma, "B"),
            text=(text, f"B L {c.joint_attention_dim}"),
            ref_tokens=(ref_tokens, f"B M {c.in_channels}"), ref_ids=(ref_ids, "B M 4"),
        )
        if (ref_tokens is None) != (ref_ids is None):
            raise ValueError("Flux2Transformer: ref_tokens and ref_ids go together, got only one")
        B, h, w, L = (dims[name] for name in "BhwL")
        self.check_sizes(h, w, L)

        image = x.reshape(B, h * w, c.in_channels)
        ids = np.concatenate([text_ids(L), image_ids(h, w)])
        ids = jnp.broadcast_to(jnp.asarray(ids), (B, *ids.shape))
        if ref_tokens is not None:
            image = jnp.concatenate([image, ref_tokens.astype(image.dtype)], axis=1)
            ids = jnp.concatenate([ids, ref_ids], axis=1)
        tables = axis_tables(c.axes_dims_rope, (POSITIONS,) * 4, c.rope_theta)
        cos, sin = gather_cos_sin(tables, ids)

        time = TimeEmbedding(c, self.dtype, name="time_embedder")(sigma)
        image = dense(c.dim, self.dtype, "x_embedder")(image)
        text = dense(c.dim, self.dtype, "context_embedder")(text)

        def modulation(parts, name):
            return dense(parts * c.dim, self.dtype, name)(nn.silu(time))[:, None]

        double = scan_layers(DoubleBlock, c.num_layers, self.remat, NAMES, num_broadcast=4)
        (text, image), _ = double(c, self.dtype, name="transformer_blocks")(
            (text, image), modulation(6, "double_stream_modulation_txt"),
            modulation(6, "double_stream_modulation_img"), cos, sin,
        )
        both = jnp.concatenate([text, image], axis=1)
        single = scan_layers(SingleBlock, c.num_single_layers, self.remat, NAMES, 3)
        both, _ = single(c, self.dtype, name="single_transformer_blocks")(
            both, modulation(3, "single_stream_modulation"), cos, sin
        )
        # The last modulation holds the scale first, unlike the others.
        scale, shift = jnp.split(modulation(2, "norm_out"), 2, axis=-1)
        out = modulated(both[:, L : L + h * w], shift, scale, c)
        return dense(c.in_channels, self.dtype, "proj_out")(out).reshape(x.shape)

    def smallest_inputs(self) -> tuple[jax.Array, ...]:
        """Arguments of `__call__` with B = 1, to make parameters or their shapes."""
        c = self.config
        return (
            jnp.zeros((1, 1, 1, c.in_channels)), jnp.zeros(1),
            jnp.zeros((1, 1, c.joint_attention_dim)),
        )

    def check_sizes(self, h: int, w: int, L: int) -> None:
        """Raises ValueError unless the network takes latents [h, w] beside L text tokens."""
        wrong = [
            f"{name} = {size} must lie within 1 to {POSITIONS}"
            for name, size in (("h", h), ("w", w), ("text length", L))
            if not 1 <= size <= POSITIONS
        ]
        if wrong:
            raise ValueError("Flux2Transformer: " + "; ".join(wrong))
