"""The Z-Image transformer (single stream with two refiners), numerically that of diffusers.

Source: diffusers `ZImageTransformer2DModel` and the tensors of Tongyi-MAI/Z-Image-Turbo.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core.checks import COUNT, POSITIVE, check_shapes, list_of, value_problems
from dopsd_jax.models.attention import attention
from dopsd_jax.models.layers import (
    Dense,
    Dtype,
    LayerNorm,
    ParamNames,
    RMSNorm,
    parameter,
    scan_layers,
    sinusoid,
)
from dopsd_jax.models.rope import axis_tables, gather_cos_sin, rotate_interleaved

SEQUENCE_MULTIPLE = 32  # image and caption are each padded to it; the pads are attended
TIME_CHANNELS = 256
NAMES = ParamNames(
    columns=("to_q", "to_k", "to_v", "w1", "w3"), rows=("to_out", "w2"),
    whole=("x_pad_token", "cap_pad_token"),
    matmuls=("to_q", "to_k", "to_v", "w1", "w3"), last=("to_out", "w2", "adaLN_modulation"),
)

KINDS = {
    "in_channels": COUNT, "dim": COUNT, "n_layers": COUNT, "n_refiner_layers": COUNT,
    "n_heads": COUNT, "cap_feat_dim": COUNT, "norm_eps": POSITIVE, "rope_theta": POSITIVE,
    "t_scale": POSITIVE, "axes_dims": list_of(COUNT, 3), "axes_lens": list_of(COUNT, 3),
    "all_patch_size": list_of(COUNT, 1),
}


@dataclasses.dataclass(frozen=True)
class ZImageConfig:
    """Architecture numbers; the defaults are those of Z-Image and Z-Image-Turbo."""

    in_channels: int = 16
    patch_size: int = 2
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    cap_feat_dim: int = 2560
    norm_eps: float = 1e-5
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)

    @classmethod
    def turbo(cls) -> ZImageConfig:
        """Tongyi-MAI/Z-Image-Turbo (and Z-Image): 6,154,908,736 parameters."""
        return cls()

    @classmethod
    def from_json(cls, values: dict) -> ZImageConfig:
        """From a diffusers transformer/config.json.

        Raises:
            ValueError: Every value that is missing, impossible or not supported here, together.
        """
        fixed = {
            "_class_name": "ZImageTransformer2DModel",
            "all_f_patch_size": [1],
            "qk_norm": True,
            "siglip_feat_dim": None,
        }
        problems = [
            f"{key}: expected {want!r}, got {values[key]!r}"
            for key, want in fixed.items()
            if key in values and _plain(values[key]) != want
        ]
        values = {"all_patch_size": [2], **values}
        wrong = value_problems(values, KINDS)
        problems += wrong.values()
        if not wrong.keys() & {"dim", "n_heads", "axes_dims"}:
            problems += _break_heads(values["dim"], values["n_heads"], values["axes_dims"])
        own = {f.name for f in dataclasses.fields(cls)} - {"patch_size"}
        ignored = {"n_kv_heads", "all_patch_size", "_diffusers_version", "_name_or_path", *fixed}
        unknown = sorted(set(values) - own - ignored)
        if unknown:
            problems.append(f"unknown keys {unknown}")
        if problems:
            raise ValueError("Z-Image transformer config: " + "; ".join(problems))
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in own}
        return cls(patch_size=values["all_patch_size"][0], **given)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def time_dim(self) -> int:
        return min(self.dim, 256)


def _break_heads(dim: int, n_heads: int, axes_dims: list[int]) -> list[str]:
    """How width, heads and rope axes do not go together."""
    if dim % n_heads:
        return [f"dim: expected a multiple of n_heads = {n_heads}, got {dim}"]
    if sum(axes_dims) != dim // n_heads or any(d % 2 for d in axes_dims):
        return [
            f"axes_dims: expected even numbers whose sum is dim / n_heads = {dim // n_heads}, got "
            f"{list(axes_dims)}"
        ]
    return []


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def round_up(n: int | jax.Array, multiple: int = SEQUENCE_MULTIPLE) -> int | jax.Array:
    return -(-n // multiple) * multiple


class TimeEmbedding(nn.Module):
    """t [B] in [0, 1] -> [B, features]: sinusoid of t_scale t in float32, then an MLP."""

    features: int
    t_scale: float
    dtype: Dtype

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        x = sinusoid(t.astype(jnp.float32) * self.t_scale, TIME_CHANNELS)
        x = nn.silu(Dense(1024, dtype=self.dtype, name="mlp_0")(x))
        return Dense(self.features, dtype=self.dtype, name="mlp_2")(x)


class Attention(nn.Module):
    config: ZImageConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, cos, sin, lengths) -> jax.Array:
        c = self.config

        def project(name):
            y = Dense(c.dim, use_bias=False, dtype=self.dtype, name=name)(x)
            return y.reshape(*y.shape[:2], c.n_heads, c.head_dim)

        q, k, v = project("to_q"), project("to_k"), project("to_v")
        q = RMSNorm(c.norm_eps, self.dtype, name="norm_q")(q)
        k = RMSNorm(c.norm_eps, self.dtype, name="norm_k")(k)
        q, k = rotate_interleaved(q, cos, sin), rotate_interleaved(k, cos, sin)
        out = attention(q, k, v, lengths=lengths).reshape(x.shape)
        return Dense(c.dim, use_bias=False, dtype=self.dtype, name="to_out")(out)


class FeedForward(nn.Module):
    config: ZImageConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(features, name):
            return Dense(features, use_bias=False, dtype=self.dtype, name=name)

        gate = nn.silu(dense(self.config.mlp_dim, "w1")(x))
        return dense(self.config.dim, "w2")(gate * dense(self.config.mlp_dim, "w3")(x))


class Block(nn.Module):
    """Attention and SwiGLU, each between two RMS norms; scaled and gated by time if modulated.

    The modulation has no SiLU before it, no shift, and a tanh on its gates.
    """

    config: ZImageConfig
    dtype: Dtype
    modulated: bool

    @nn.compact
    def __call__(self, x: jax.Array, time, cos, sin, lengths) -> tuple[jax.Array, None]:
        c = self.config
        scale_attn = gate_attn = scale_ffn = gate_ffn = None
        if self.modulated:
            m = Dense(4 * c.dim, dtype=self.dtype, name="adaLN_modulation")(time)[:, None]
            scale_attn, gate_attn, scale_ffn, gate_ffn = jnp.split(m, 4, axis=-1)

        def norm(y, name, scale=None):
            y = RMSNorm(c.norm_eps, self.dtype, name=name)(y)
            return y if scale is None else y * (1 + scale)

        def gated(y, gate):
            return y if gate is None else jnp.tanh(gate) * y

        h = norm(x, "attention_norm1", scale_attn)
        h = Attention(c, self.dtype, name="attention")(h, cos, sin, lengths)
        x = x + gated(norm(h, "attention_norm2"), gate_attn)
        h = norm(x, "ffn_norm1", scale_ffn)
        h = FeedForward(c, self.dtype, name="feed_forward")(h)
        x = x + gated(norm(h, "ffn_norm2"), gate_ffn)
        self.sow("intermediates", "hidden", x)  # kept only where a caller asks for it
        return x, None


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """Latents [B, h, w, C] -> tokens [B, (h/p)(w/p), p p C], raster order, channel fastest."""
    B, h, w, C = x.shape
    x = x.reshape(B, h // patch, patch, w // patch, patch, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, patch * patch * C)


def unpatchify(tokens: jax.Array, patch: int, h: int, w: int) -> jax.Array:
    """The inverse of `patchify`: tokens [B, N, p p C] -> [B, h, w, C]."""
    x = tokens.reshape(tokens.shape[0], h // patch, w // patch, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(tokens.shape[0], h, w, -1)


def position_ids(rows: int, cols: int, num_text: int, text_lengths: jax.Array):
    """Positions (t, h, w) of image and caption tokens.

    The image's t coordinate follows the caption's length padded to SEQUENCE_MULTIPLE, which
    differs from row to row of a batch. Image pads sit at (0, 0, 0).

    Args:
        rows, cols: Token grid of the image.
        num_text: Static caption length L.
        text_lengths: int32 [B], real caption lengths.

    Returns:
        image int32 [B, round_up(rows cols), 3], text int32 [B, L, 3].
    """
    B = text_lengths.shape[0]
    padded = round_up(text_lengths)
    h, w = np.divmod(np.arange(rows * cols), cols)
    t = jnp.broadcast_to((padded + 1)[:, None], (B, rows * cols))
    image = jnp.stack([t, *(jnp.broadcast_to(jnp.asarray(i), t.shape) for i in (h, w))], axis=-1)
    image = jnp.pad(image, ((0, 0), (0, round_up(rows * cols) - rows * cols), (0, 0)))
    text = jnp.zeros((B, num_text, 3), jnp.int32).at[..., 0].set(jnp.arange(num_text) + 1)
    return image.astype(jnp.int32), text


class ZImageTransformer(nn.Module):
    """Predicts u = data - noise of a noised latent; see models/denoiser.py for the sign used here.

    Params hold stacked layers: `layers`, `noise_refiner`, `context_refiner` carry a leading axis.
    """

    config: ZImageConfig
    dtype: Dtype = jnp.float32
    remat: str = "full"

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, text: jax.Array, text_mask: jax.Array
    ) -> jax.Array:
        """One evaluation.

        Args:
            x: [B, h, w, C] latents, h and w multiples of the patch size.
            t: float32 [B], 0 noise, 1 data.
            text: [B, L, cap_feat_dim] features; L a multiple of 32.
            text_mask: bool [B, L], True on a prefix of at least one token.

        Returns:
            u: [B, h, w, C] in `dtype`.

        Raises:
            ValueError: Shapes that do not fit, or positions beyond the checkpoint's axes_lens.
        """
        c = self.config
        dims = check_shapes(
            "ZImageTransformer", x=(x, f"B h w {c.in_channels}"), t=(t, "B"),
            text=(text, f"B L {c.cap_feat_dim}"), text_mask=(text_mask, "B L"),
        )
        h, w, L = dims["h"], dims["w"], dims["L"]
        self.check_sizes(h, w, L)
        rows, cols = h // c.patch_size, w // c.patch_size
        num_image = rows * cols
        num_padded = round_up(num_image)

        lengths = jnp.sum(text_mask, axis=-1, dtype=jnp.int32)
        image_ids, text_ids = position_ids(rows, cols, L, lengths)
        tables = axis_tables(c.axes_dims, c.axes_lens, c.rope_theta)
        image_rope, text_rope = gather_cos_sin(tables, image_ids), gather_cos_sin(tables, text_ids)
        visible = round_up(lengths)  # captions are attended up to there, beyond that masked

        time = TimeEmbedding(c.time_dim, c.t_scale, self.dtype, name="t_embedder")(t)
        image = Dense(c.dim, dtype=self.dtype, name="x_embedder")(patchify(x, c.patch_size))
        image = jnp.pad(image, ((0, 0), (0, num_padded - num_image), (0, 0)))
        image = self._overwrite_pads("x_pad_token", image, jnp.arange(num_padded) < num_image)
        text = RMSNorm(c.norm_eps, self.dtype, name="cap_norm")(text)
        text = Dense(c.dim, dtype=self.dtype, name="cap_embedder")(text)
        text = self._overwrite_pads("cap_pad_token", text, text_mask)

        image = self._blocks("noise_refiner", image, time, *image_rope, None)
        text = self._blocks("context_refiner", text, None, *text_rope, visible)
        both = jnp.concatenate([image, text], axis=1)
        cos, sin = (
            jnp.concatenate(pair, axis=1) for pair in zip(image_rope, text_rope, strict=True)
        )
        both = self._blocks("layers", both, time, cos, sin, num_padded + visible)

        scale = Dense(c.dim, dtype=self.dtype, name="final_modulation")(nn.silu(time))
        out = LayerNorm(1e-6, affine=False, dtype=self.dtype, name="final_norm")(
            both[:, :num_image]
        )
        out = out * (1 + scale[:, None])
        out = Dense(c.patch_size**2 * c.in_channels, dtype=self.dtype, name="final_linear")(out)
        return unpatchify(out, c.patch_size, h, w)

    def smallest_inputs(self) -> tuple[jax.Array, ...]:
        """Arguments of `__call__` with B = 1, to make parameters or their shapes."""
        c, side = self.config, self.config.patch_size
        return (
            jnp.zeros((1, side, side, c.in_channels)), jnp.zeros(1),
            jnp.zeros((1, SEQUENCE_MULTIPLE, c.cap_feat_dim)),
            jnp.ones((1, SEQUENCE_MULTIPLE), bool),
        )

    def check_sizes(self, h: int, w: int, L: int) -> None:
        """Raises ValueError unless the network takes latents [h, w] beside L text tokens."""
        c = self.config
        problems = []
        if h % c.patch_size or w % c.patch_size:
            problems.append(f"latent size {h}x{w} must be a multiple of {c.patch_size}")
        if L % SEQUENCE_MULTIPLE or not L:
            problems.append(f"text length {L} must be a positive multiple of {SEQUENCE_MULTIPLE}")
        if c.axes_lens[0] < L + 2:
            problems.append(
                f"text length {L} needs {L + 2} positions, the checkpoint has {c.axes_lens[0]}, "
                f"enough for {(c.axes_lens[0] - 2) // SEQUENCE_MULTIPLE * SEQUENCE_MULTIPLE}"
            )
        for name, size, limit in (("h", h, c.axes_lens[1]), ("w", w, c.axes_lens[2])):
            need = size // c.patch_size
            if need > limit:
                problems.append(f"{name} = {size} needs {need} positions, there are {limit}")
        if problems:
            raise ValueError("ZImageTransformer: " + "; ".join(problems))

    def _overwrite_pads(self, name: str, tokens: jax.Array, real: jax.Array) -> jax.Array:
        pad = parameter(self, name, nn.initializers.normal(0.02), 1, self.config.dim)
        return jnp.where(real[..., None], tokens, pad.astype(tokens.dtype))

    def _blocks(self, name: str, x: jax.Array, time, cos, sin, lengths) -> jax.Array:
        length = self.config.n_layers if name == "layers" else self.config.n_refiner_layers
        scanned = scan_layers(Block, length, self.remat, NAMES, num_broadcast=4)
        block = scanned(self.config, self.dtype, modulated=name != "context_refiner", name=name)
        return block(x, time, cos, sin, lengths)[0]
