"""FLUX.2 behind the `Denoiser` protocol."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dopsd_jax.core import sharding
from dopsd_jax.core.checks import check_shapes
from dopsd_jax.models.denoiser import Context, Passes, Variables, latent_shape
from dopsd_jax.models.flux2 import Flux2Transformer


@dataclasses.dataclass(frozen=True)
class Flux2Denoiser:
    """FLUX.2: the network sees t = sigma, points from data to noise, and looks at references.

    With a mesh, evaluations are spread over it; all arrays they get must live on its devices.
    """

    network: Flux2Transformer
    pixels_per_latent: int = 16
    mesh: Mesh | None = None
    max_references = 100  # t = 10, 20, .., below the network's POSITIONS

    @property
    def pixel_multiple(self) -> int:
        """Image sides must be multiples of this: one token is so many pixels."""
        return self.pixels_per_latent

    @property
    def text_width(self) -> int:
        """D of the text features."""
        return self.network.config.joint_attention_dim

    def passes(self, image: int, text: int, references: int = 0) -> Passes:
        """Where so many tokens of an image, its text and its references pass."""
        seen, whole = image + references, image + references + text
        return Passes(
            (
                (r"time_embedder/.*|.*_modulation.*|norm_out", 1),
                (r"transformer_blocks/attn/(add_._proj|to_add_out)|.*/ff_context/.*|"
                 r"context_embedder", text),
                (r"single_transformer_blocks/.*", whole),
                (r"transformer_blocks/.*|x_embedder", seen), (r"proj_out", image),
            ),
            {"transformer_blocks": whole, "single_transformer_blocks": whole},
            matmuls_again=11 / 36,  # at most: the last linears' outputs enter no norm
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
            ctx: Context of the batch; its mask is not read, because no token is masked.

        Returns:
            float32 [B, h, w, C].
        """
        dims = check_shapes("velocity", x=(x, "B h w C"), text=(ctx.text, "B L D"))
        sigma = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), (dims["B"],))
        with sharding.use_mesh(self.mesh):
            v = self.network.apply(
                variables, x.astype(self.network.dtype), sigma, ctx.text, ctx.ref_tokens,
                ctx.ref_ids,
            )
        return v.astype(jnp.float32)
