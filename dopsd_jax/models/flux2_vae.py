"""The image autoencoder of FLUX.2: the conv network of models/vae.py, and what stands around it.

Between the raw latents [B, h, w, C] and those that a denoiser sees lie patches of 2 x 2 and the
running statistics of a batch norm: [B, h / 2, w / 2, 4 C].

Source: diffusers `AutoencoderKLFlux2` and the latents of `Flux2KleinPipeline`.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dopsd_jax.core.checks import check_shapes
from dopsd_jax.models.layers import ParamNames, parameter
from dopsd_jax.models.vae import CONV_FIELDS, Vae, read_config

PATCH = 2  # raw latents per normalised one along h and w
NAMES = ParamNames(whole=("bn_mean", "bn_var"))

# The class defaults of diffusers, which are the published numbers.
DIFFUSERS_DEFAULTS = {
    "_class_name": "AutoencoderKLFlux2",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "decoder_block_out_channels": None,
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 32,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "batch_norm_eps": 1e-4,
    "batch_norm_momentum": 0.1,  # of training the VAE; changes no number here
    "patch_size": [PATCH, PATCH],
}


@dataclasses.dataclass(frozen=True)
class Flux2VaeConfig:
    """Architecture numbers; see models/vae.py for those of the conv network.

    Attributes:
        latent_channels: C of the raw latents; the denoiser sees 4 C.
        batch_norm_eps: Added to the running variance.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    batch_norm_eps: float
    in_channels: int = 3

    @classmethod
    def klein(cls) -> Flux2VaeConfig:
        """FLUX.2-klein-4B/vae, also of 9B: 84,046,115 parameters and 256 running statistics."""
        return cls.from_json({})

    @classmethod
    def from_json(cls, values: dict) -> Flux2VaeConfig:
        """From a diffusers vae/config.json.

        Raises:
            ValueError: Every key whose value this port does not support, together.
        """
        full = read_config(
            values, DIFFUSERS_DEFAULTS, use_quant_conv=True, use_post_quant_conv=True,
            decoder_block_out_channels=None, patch_size=[PATCH, PATCH],
        )
        return cls(
            **{name: full[name] for name in CONV_FIELDS}, batch_norm_eps=full["batch_norm_eps"]
        )

    @property
    def factor(self) -> int:
        """Pixels per normalised latent along H and W."""
        return PATCH * 2 ** (len(self.block_out_channels) - 1)

    @property
    def normalised_channels(self) -> int:
        """Channels of the latents that a denoiser sees."""
        return PATCH * PATCH * self.latent_channels


class Flux2Vae(Vae):
    """Images to latents and back, with the methods of `Vae`.

    The statistics are parameters here, `bn_mean [4C]` and `bn_var [4C]`.
    """

    config: Flux2VaeConfig

    def setup(self):
        super().setup()
        c = self.config
        self.quant_conv = nn.Conv(2 * c.latent_channels, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(c.latent_channels, (1, 1), dtype=self.dtype)
        width = c.normalised_channels
        self.bn_mean = parameter(self, "bn_mean", nn.initializers.zeros, width)
        self.bn_var = parameter(self, "bn_var", nn.initializers.ones, width)

    def encode(self, images: jax.Array) -> jax.Array:
        """The moments of the posterior: [B, H, W, 3] -> [B, h, w, 2C], see `Vae.encode`."""
        return self.quant_conv(super().encode(images))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images of raw latents: [B, h, w, C] -> [B, H, W, 3], see `Vae.decode`."""
        return super().decode(self.post_quant_conv(latents))

    def encode_mode(self, images: jax.Array) -> jax.Array:
        """Normalised latents at the posterior's mode: [B, H, W, 3] -> float32 [B, h/2, w/2, 4C].

        Source: diffusers `Flux2KleinPipeline._encode_vae_image`.
        """
        mode, _ = jnp.split(self.encode(images).astype(jnp.float32), 2, axis=-1)
        mean, deviation = self._statistics()
        return (to_patches(mode) - mean) / deviation

    def decode_normalised(self, z: jax.Array) -> jax.Array:
        """Images of normalised latents: [B, h/2, w/2, 4C] -> [B, H, W, 3], not clipped."""
        check_shapes("Vae.decode_normalised", z=(z, f"B h w {self.config.normalised_channels}"))
        mean, deviation = self._statistics()
        return self.decode(from_patches(z.astype(jnp.float32) * deviation + mean))

    def _statistics(self) -> tuple[jax.Array, jax.Array]:
        variance = self.bn_var.astype(jnp.float32) + self.config.batch_norm_eps
        return self.bn_mean.astype(jnp.float32), jnp.sqrt(variance)


def to_patches(z: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, h/2, w/2, 4C]; channel c at row i, column j is then 4 c + 2 i + j."""
    B, h, w, C = z.shape
    z = z.reshape(B, h // PATCH, PATCH, w // PATCH, PATCH, C)
    return z.transpose(0, 1, 3, 5, 2, 4).reshape(B, h // PATCH, w // PATCH, -1)


def from_patches(z: jax.Array) -> jax.Array:
    """The inverse of `to_patches`."""
    B, h, w, _ = z.shape
    z = z.reshape(B, h, w, -1, PATCH, PATCH).transpose(0, 1, 4, 2, 5, 3)
    return z.reshape(B, h * PATCH, w * PATCH, -1)
