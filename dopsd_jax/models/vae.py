"""The image autoencoder of Z-Image (FLUX.1 type), numerically diffusers' AutoencoderKL, NHWC.

Its conv network is that of FLUX.2 too; see models/flux2_vae.py for the rest of that one.

Parameter names follow the tensor names: `encoder.down_blocks.0.resnets.1.conv1.weight` is
`encoder/down_blocks_0/resnets_1/conv1/kernel`.

Source: diffusers `AutoencoderKL` without quant convs; numbers of Tongyi-MAI/Z-Image-Turbo/vae.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dopsd_jax.core.checks import (
    COUNT,
    POSITIVE,
    Kind,
    check_shapes,
    is_number,
    list_of,
    value_problems,
)
from dopsd_jax.models.attention import attention
from dopsd_jax.models.layers import Dense, Dtype
from dopsd_jax.models.vae_strips import Strips, wanted

NORM_EPS = 1e-6
STACKS = (r"(down|up)_blocks_\d+", "mid_block")

# What diffusers assumes for a key that config.json leaves out: its class defaults, some of
# which (the quant convs) this port does not support.
DIFFUSERS_DEFAULTS = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
KINDS = {
    "in_channels": COUNT, "block_out_channels": list_of(COUNT), "layers_per_block": COUNT,
    "latent_channels": COUNT, "norm_num_groups": COUNT,
}
FACTORS = {
    "scaling_factor": POSITIVE,
    "shift_factor": Kind("a number or null", lambda x: x is None or is_number(x)),
}
CONV_FIELDS = tuple(KINDS)  # what the conv network itself is made of
# Keys that change no number here: tiling sizes, float16 advice, provenance.
IGNORED_KEYS = {"sample_size", "force_upcast", "_diffusers_version", "_name_or_path"}


def read_config(
    values: dict, defaults: dict, kinds: dict[str, Kind] | None = None, **expected
) -> dict:
    """A vae/config.json, complete and checked against what the conv network supports.

    Args:
        values: Of the file.
        defaults: What diffusers assumes for absent keys; its `_class_name` must be the file's.
        kinds: What further values must be.
        **expected: Further keys with the only value that is supported.

    Returns:
        `defaults` overwritten by `values`, block_out_channels as a tuple.

    Raises:
        ValueError: Every key whose value is impossible or not supported, together.
    """
    full = {**defaults, **values}
    wrong = value_problems(full, KINDS | (kinds or {}))
    widths = [] if "block_out_channels" in wrong else list(full["block_out_channels"])
    expected = {
        "_class_name": defaults["_class_name"],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "out_channels": full["in_channels"],
        "act_fn": "silu",
        "mid_block_add_attention": True,
    } | expected
    if "block_out_channels" in wrong:
        del expected["down_block_types"], expected["up_block_types"]
    problems = list(wrong.values())
    for key, want in expected.items():
        got = list(full[key]) if isinstance(full[key], tuple) else full[key]
        if got != want:
            absent = "" if key in values else " (absent, the default of diffusers)"
            problems.append(f"{key}: expected {want!r}, got {got!r}{absent}")
    groups = full["norm_num_groups"]
    if "norm_num_groups" not in wrong and any(width % groups for width in widths):
        problems.append(f"norm_num_groups: {groups} does not divide each width of {widths}")
    if unknown := sorted(set(values) - set(defaults) - IGNORED_KEYS):
        problems.append(f"unknown keys {unknown}")
    if problems:
        raise ValueError("VAE config: " + "; ".join(problems))
    return full | {"block_out_channels": tuple(widths)}


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Architecture numbers.

    Attributes:
        block_out_channels: Width of each resolution, finest first; each but the last halves H, W.
        layers_per_block: Residual blocks per encoder resolution; the decoder has one more.
        latent_channels: C.
        norm_num_groups: Groups of every GroupNorm; divides every width.
        scaling_factor: The denoiser sees (latents - shift_factor) * scaling_factor.
        shift_factor: See scaling_factor.
        in_channels: Channels of the image, encoded and decoded.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    in_channels: int = 3

    @classmethod
    def z_image(cls) -> VaeConfig:
        """Tongyi-MAI/Z-Image-Turbo/vae, the FLUX.1 VAE: 83,819,683 parameters."""
        return cls(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=32,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )

    @classmethod
    def from_json(cls, values: dict) -> VaeConfig:
        """From a diffusers vae/config.json.

        Raises:
            ValueError: Every key whose value is impossible or not supported here, together.
        """
        full = read_config(
            values, DIFFUSERS_DEFAULTS, FACTORS, use_quant_conv=False, use_post_quant_conv=False,
            latents_mean=None, latents_std=None,
        )
        return cls(
            **{name: full[name] for name in CONV_FIELDS},
            scaling_factor=full["scaling_factor"], shift_factor=full["shift_factor"] or 0.0,
        )

    @property
    def factor(self) -> int:
        """Pixels per latent along H and W, raw and normalised."""
        return 2 ** (len(self.block_out_channels) - 1)


class Vae(nn.Module):
    """Images to latents and back.

    `encode` and `decode` speak the raw space of the VAE; `encode_mode` and `decode_normalised`
    speak the normalised latents, (latents - shift_factor) * scaling_factor, that a denoiser sees.
    """

    config: VaeConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Decodes the mode of what it encodes; init through it makes every parameter."""
        return self.decode_normalised(self.encode_mode(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """The moments of the posterior.

        Args:
            images: [B, H, W, 3] in [-1, 1]; H and W multiples of `config.factor`.

        Returns:
            [B, h, w, 2C] in `dtype`: C means, then C log variances (not clamped).

        Raises:
            ValueError: Wrong rank, channels or an H or W that the encoder would crop.
        """
        dims = check_shapes("Vae.encode", images=(images, f"B H W {self.config.in_channels}"))
        factor = self.config.factor
        if dims["H"] % factor or dims["W"] % factor:
            raise ValueError(
                f"Vae.encode: expected H and W to be multiples of {factor}, got "
                f"{dims['H']}x{dims['W']}; crop or resize the images first"
            )
        return self.encoder(images)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images of raw latents.

        Args:
            latents: [B, h, w, C].

        Returns:
            [B, H, W, 3] in `dtype`, about [-1, 1], not clipped.
        """
        check_shapes("Vae.decode", latents=(latents, f"B h w {self.config.latent_channels}"))
        return self.decoder(latents)

    def encode_mode(self, images: jax.Array) -> jax.Array:
        """Normalised latents at the mode of the posterior: [B, H, W, 3] -> float32 [B, h, w, C].

        Source: D-OPSD and diffusers training scripts, (mode - shift_factor) * scaling_factor.
        """
        mode, _ = jnp.split(self.encode(images).astype(jnp.float32), 2, axis=-1)
        return (mode - self.config.shift_factor) * self.config.scaling_factor

    def decode_normalised(self, z: jax.Array) -> jax.Array:
        """Images of normalised latents: [B, h, w, C] -> [B, H, W, 3] in `dtype`, not clipped."""
        z = z.astype(jnp.float32)
        return self.decode(z / self.config.scaling_factor + self.config.shift_factor)


class Encoder(nn.Module):
    """[B, H, W, 3] -> moments [B, h, w, 2C]."""

    config: VaeConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, widths = self.config, self.config.block_out_channels
        groups, last = config.norm_num_groups, len(widths) - 1
        if self.is_initializing() or not wanted(*x.shape[1:3], widths[0], self.dtype):
            x = _conv(widths[0], self.dtype, "conv_in")(x)
            for i, width in enumerate(widths):
                x = DownBlock(width, config.layers_per_block, i < last, groups, self.dtype,
                              name=f"down_blocks_{i}")(x)
        else:
            x = Strips(groups, NORM_EPS, self.dtype).encode(self.variables["params"], x)
        x = MidBlock(groups, self.dtype, name="mid_block")(x)
        x = nn.silu(_norm(groups, self.dtype, "conv_norm_out")(x))
        return _conv(2 * config.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """[B, h, w, C] -> [B, H, W, 3]; up_blocks_0 is the coarsest."""

    config: VaeConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, widths = self.config, self.config.block_out_channels[::-1]
        groups, last = config.norm_num_groups, len(widths) - 1
        x = _conv(widths[0], self.dtype, "conv_in")(x)
        x = MidBlock(groups, self.dtype, name="mid_block")(x)
        H, W = (side * 2**last for side in x.shape[1:3])
        if wanted(H, W, widths[-1], self.dtype) and not self.is_initializing():
            return Strips(groups, NORM_EPS, self.dtype).decode(self.variables["params"], x)
        for i, width in enumerate(widths):
            x = UpBlock(width, config.layers_per_block + 1, i < last, groups, self.dtype,
                        name=f"up_blocks_{i}")(x)
        x = nn.silu(_norm(groups, self.dtype, "conv_norm_out")(x))
        return _conv(config.in_channels, self.dtype, "conv_out")(x)


class DownBlock(nn.Module):
    """Residual blocks, then H and W halved if `downsample`."""

    features: int
    num_layers: int
    downsample: bool
    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{i}")(x)
        if self.downsample:
            # The torch network pads right and bottom only.
            x = nn.Conv(self.features, (3, 3), strides=2, padding=((0, 1), (0, 1)),
                        dtype=self.dtype, name="downsamplers_0")(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks, then H and W doubled if `upsample`."""

    features: int
    num_layers: int
    upsample: bool
    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{i}")(x)
        if self.upsample:
            x = _conv(self.features, self.dtype, "upsamplers_0")(_nearest_double(x))
        return x


class MidBlock(nn.Module):
    """Residual block, attention over all positions, residual block; width unchanged."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = ResnetBlock(width, self.groups, self.dtype, name="resnets_0")(x)
        x = AttentionBlock(self.groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(width, self.groups, self.dtype, name="resnets_1")(x)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1x1 conv where the width changes."""

    features: int
    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(_norm(self.groups, self.dtype, "norm1")(x))
        h = _conv(self.features, self.dtype, "conv1")(h)
        h = nn.silu(_norm(self.groups, self.dtype, "norm2")(h))
        h = _conv(self.features, self.dtype, "conv2")(h)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + attention of the normalised x over all H W positions: one head as wide as x."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, D = x.shape
        h = _norm(self.groups, self.dtype, "group_norm")(x).reshape(B, H * W, D)
        q, k, v = (Dense(D, dtype=self.dtype, name=f"to_{p}")(h)[:, :, None] for p in "qkv")
        h = attention(q, k, v)[:, :, 0]
        return x + Dense(D, dtype=self.dtype, name="to_out_0")(h).reshape(B, H, W, D)


def _nearest_double(x: jax.Array) -> jax.Array:
    """[B, H, W, D] -> [B, 2H, 2W, D], every pixel four times."""
    B, H, W, D = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, D))
    return x.reshape(B, 2 * H, 2 * W, D)


def _conv(features: int, dtype: Dtype, name: str) -> nn.Conv:
    return nn.Conv(features, (3, 3), padding=1, dtype=dtype, name=name)


def _norm(groups: int, dtype: Dtype, name: str) -> nn.GroupNorm:
    # The fast formula E[x^2] - E[x]^2 loses digits where the mean is large.
    return nn.GroupNorm(groups, epsilon=NORM_EPS, use_fast_variance=False, dtype=dtype, name=name)
