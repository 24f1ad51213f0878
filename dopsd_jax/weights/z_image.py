"""The family of Tongyi-MAI/Z-Image-Turbo and Z-Image."""

from __future__ import annotations

from dopsd_jax.models.family import Elsewhere, Family, TextRules
from dopsd_jax.models.qwen3 import Qwen3Config
from dopsd_jax.models.vae import VaeConfig
from dopsd_jax.models.z_image import NAMES, ZImageConfig, ZImageTransformer
from dopsd_jax.models.z_image_denoiser import ZImageDenoiser
from dopsd_jax.weights.vae_names import PLAIN_VAE
from dopsd_jax.weights.z_image_names import (
    Z_IMAGE_TARGETS,
    z_image_makers_table,
    z_image_modules,
    z_image_table,
)


def _text(config: Qwen3Config) -> TextRules:
    # The feature is the residual stream before the last layer, which is therefore never run. Fewer
    # tokens for short prompts, few programs to compile, and the same picture, because whatever lies
    # beyond the next 32 tokens is masked.
    return TextRules((config.num_layers - 1,), True, (64, 128, 256, 512), attends_pads=False)


Z_IMAGE = Family(
    pipeline="ZImagePipeline",
    config=ZImageConfig,
    network=ZImageTransformer,
    denoiser=ZImageDenoiser,
    names=NAMES,
    table=z_image_table,
    other_tables=(z_image_makers_table,),
    modules=z_image_modules,
    targets=Z_IMAGE_TARGETS,
    text=_text,
    vae=PLAIN_VAE,
    published={"z_image_turbo": ZImageConfig.turbo()},
    encoders={"z_image_turbo": (Qwen3Config.qwen3_4b(), VaeConfig.z_image())},
    # Nothing else in their files tells the two apart: Z-Image has shift 6, Z-Image-Turbo 3.
    is_distilled=lambda index, shift: shift != 6.0,
    unguided=0.0,  # diffusers' ZImagePipeline: positive + scale (positive - negative)
    elsewhere=Elsewhere(
        hub={"z_image_turbo": "Tongyi-MAI/Z-Image-Turbo"}, spec={"z_image_turbo": "Z-Image"},
        arguments={"guidance_scale": 0.0},
    ),
)
