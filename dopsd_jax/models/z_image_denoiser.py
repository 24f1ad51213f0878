"""Z-Image behind the `Denoiser` protocol."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dopsd_jax.core import sharding
from dopsd_jax.core.checks import check_shapes
from dopsd_jax.models.denoiser import Context, Passes, Variables, latent_shape
from dopsd_jax.models.z_image import ZImageTransformer, round_up


@dataclasses.dataclass(frozen=True)
class ZImageDenoiser:
    """Z-Image: the network sees t = 1 - sigma and points from noise to data.

    With a mesh, evaluations are spread over it; all arrays they get must live on its devices.
    """

    network: ZImageTransformer
    pixels_per_latent: int = 8
    mesh: Mesh | None = None

    max_references = 0

    @property
    def pixel_multiple(self) -> int:
        """Image sides must be multiples of this: one token is so many pixels."""
        return self.pixels_per_latent * self.network.config.patch_size

    @property
    def text_width(self) -> int:
        """D of the text features."""
        return self.network.config.cap_feat_dim

    def passes(self, image: int, text: int, references: int = 0) -> Passes:
        """Where so many tokens of an image and its text pass; it takes no references."""
        del references
        padded = round_up(image)
        return Passes(
            (
                (r".*adaLN_modulation|t_embedder/.*|final_modulation", 1),
                (r"layers/.*", padded + text), (r"noise_refiner/.*", padded),
                (r"context_refiner/.*|cap_embedder", text), (r"x_embedder|final_linear", image),
            ),
            {"layers": padded + text, "noise_refiner": padded, "context_refiner": text},
            matmuls_again=11 / 36,  # to_out and w2, (1 + 8 / 3) of 12 D^2
        )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [h, w, C] of the latents of one image.

        Raises:
            ValueError: Sides that are not positive multiples of `pixel_multiple`.
        """
        return latent_shape(self, height, width)

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
        return -self._apply(variables, x, sigma, ctx).astype(jnp.float32)

    def velocity_and_layers(
        self, variables: Variables, x: jax.Array, sigma: jax.Array, ctx: Context
    ) -> tuple[jax.Array, jax.Array]:
        """`velocity`, and the output of every layer of the main stream, [layers, B, N, dim].

        Image tokens come first in N. All layers stay in memory.
        """
        u, seen = self._apply(variables, x, sigma, ctx, mutable=["intermediates"])
        return -u.astype(jnp.float32), seen["intermediates"]["layers"]["hidden"][0]

    def _apply(self, variables: Variables, x: jax.Array, sigma: jax.Array, ctx: Context, **kwargs):
        dims = check_shapes(
            "velocity", x=(x, "B h w C"), text=(ctx.text, "B L D"), mask=(ctx.text_mask, "B L")
        )
        if ctx.ref_tokens is not None:
            raise ValueError("Z-Image takes no reference tokens; use the recipe vlm")
        t = jnp.broadcast_to(1.0 - jnp.asarray(sigma, jnp.float32), (dims["B"],))
        with sharding.use_mesh(self.mesh):
            return self.network.apply(
                variables, x.astype(self.network.dtype), t, ctx.text, ctx.text_mask, **kwargs
            )
