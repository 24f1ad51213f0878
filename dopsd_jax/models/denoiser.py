"""The seam between the method and the model families: every family is v = dx/dsigma here.

The method knows `Denoiser` alone, the protocol.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dopsd_jax.core.checks import check_shapes
from dopsd_jax.models.rope import image_ids

Variables = dict[str, Any]


@flax.struct.dataclass
class Context:
    """All that conditions the denoiser.

    Attributes:
        text: [B, L, D] features, zero behind the mask.
        text_mask: bool [B, L], True on a prefix: what the denoiser looks at. Of a network that
            attends to the features of pads too, True everywhere.
        ref_tokens: [B, M, C] clean reference tokens, or None.
        ref_ids: int32 [B, M, 4] their positions, or None.
    """

    text: jax.Array
    text_mask: jax.Array
    ref_tokens: jax.Array | None = None
    ref_ids: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Passes:
    """How many tokens pass where in one evaluation for one picture; for counting FLOPs.

    Attributes:
        layers: (regex of the names of layers, tokens); the first match counts.
        attends: Stack of layers -> length of the sequence that attends to itself in each.
        matmuls_again: Share of the products with weights that the remat policy "matmuls", see
            models/layers.py, computes again.
    """

    layers: tuple[tuple[str, int], ...]
    attends: dict[str, int]
    matmuls_again: float


class Denoiser(Protocol):
    """A family's network as the method sees it: a frozen dataclass with these fields.

    Attributes:
        network: The Flax module; its config has `dim`, the width of all that attends.
        pixels_per_latent: Of the VAE, along each side.
        mesh: Over which evaluations are spread, or None; all arrays they get must then live on its
            devices.
        max_references: How many reference images it takes; their tokens come with positions
            (t, h, w, 0), see `reference_tokens`.
        pixel_multiple: Image sides must be multiples of this: one token is so many pixels.
        text_width: D of the text features.
    """

    network: nn.Module
    pixels_per_latent: int
    mesh: Mesh | None
    max_references: int

    @property
    def pixel_multiple(self) -> int: ...

    @property
    def text_width(self) -> int: ...

    def passes(self, image: int, text: int, references: int = 0) -> Passes:
        """Where so many tokens of an image, its text and its references pass."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [h, w, C] of the latents of one image, see `latent_shape`."""

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
        """


def latent_shape(denoiser: Denoiser, height: int, width: int) -> tuple[int, int, int]:
    """Shape [h, w, C] of the latents of one image.

    Raises:
        ValueError: Sides that are not positive multiples of `pixel_multiple`.
    """
    m = denoiser.pixel_multiple
    if height < m or width < m or height % m or width % m:
        raise ValueError(
            f"image size: expected height and width in positive multiples of {m}, got "
            f"{height}x{width} (height x width)"
        )
    f = denoiser.pixels_per_latent
    return height // f, width // f, denoiser.network.config.in_channels


REFERENCE_SPACING = 10  # of the references' t coordinates; the image that is drawn has t = 0


def reference_tokens(latents: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Clean latents of reference images as tokens.

    Args:
        latents: Of one reference after the other, [B, h, w, C]; h and w may differ.

    Returns:
        ref_tokens [B, M, C] and ref_ids int32 [B, M, 4], M the sum of all h w. Reference r,
        counted from 0, has t = 10 (r + 1).

    Source: diffusers `Flux2KleinPipeline._prepare_image_ids`.
    """
    tokens, ids = [], []
    for r, z in enumerate(latents):
        dims = check_shapes("reference_tokens", latents=(z, "B h w C"))
        tokens.append(z.reshape(dims["B"], -1, dims["C"]))
        ids.append(image_ids(dims["h"], dims["w"], t=REFERENCE_SPACING * (r + 1)))
    tokens, ids = jnp.concatenate(tokens, axis=1), jnp.concatenate(ids)
    return tokens, jnp.broadcast_to(ids, (tokens.shape[0], *ids.shape))
