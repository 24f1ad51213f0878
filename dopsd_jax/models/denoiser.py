"""The seam between the method and the model families: every family is v = dx/dsigma here."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dopsd_jax.core.checks import check_shapes
from dopsd_jax.models.z_image import ZImageTransformer

Variables = dict[str, Any]


@flax.struct.dataclass
class Context:
    """All that conditions the denoiser.

    Attributes:
        text: [B, L, D] features, zero behind the mask.
        text_mask: bool [B, L], True on a prefix.
        ref_tokens: [B, M, C] clean reference tokens, or None.
        ref_ids: int32 [B, M, 4] their positions, or None.
    """

    text: jax.Array
    text_mask: jax.Array
    ref_tokens: jax.Array | None = None
    ref_ids: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class ZImageDenoiser:
    """Z-Image: the network sees t = 1 - sigma and points from noise to data."""

    network: ZImageTransformer
    pixels_per_latent: int = 8

    @property
    def pixel_multiple(self) -> int:
        """Image sides must be multiples of this."""
        return self.pixels_per_latent * self.network.config.patch_size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [h, w, C] of the latents of one image.

        Raises:
            ValueError: Sides that are not positive multiples of `pixel_multiple`.
        """
        m = self.pixel_multiple
        if height < m or width < m or height % m or width % m:
            raise ValueError(
                f"image size: expected height and width in positive multiples of {m}, got "
                f"{height}x{width} (height x width)"
            )
        f = self.pixels_per_latent
        return height // f, width // f, self.network.config.in_channels

    def velocity(
        self, variables: Variables, x: jax.Array, sigma: jax.Array, ctx: Context
    ) -> jax.Array:
        """v = dx/dsigma = noise - x0 at x.

        Args:
            variables: {"params": ..} and, with LoRA, {"lora": ..} already scaled.
            x: float32 [B, h, w, C].
            sigma: float32 scalar or [B].
            ctx: Context of the batch.

        Returns:
            float32 [B, h, w, C].

        Raises:
            ValueError: A context with reference tokens, which this family cannot take.
        """
        dims = check_shapes(
            "velocity", x=(x, "B h w C"), text=(ctx.text, "B L D"), mask=(ctx.text_mask, "B L")
        )
        if ctx.ref_tokens is not None:
            raise ValueError("Z-Image takes no reference tokens; use the recipe vlm")
        t = jnp.broadcast_to(1.0 - jnp.asarray(sigma, jnp.float32), (dims["B"],))
        u = self.network.apply(
            variables, x.astype(self.network.dtype), t, ctx.text, ctx.text_mask
        )
        return -u.astype(jnp.float32)
