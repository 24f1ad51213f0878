"""The family of FLUX.2-klein-4B and 9B."""

from __future__ import annotations

import math

from dopsd_jax.models.family import Elsewhere, Family, TextRules
from dopsd_jax.models.flux2 import NAMES, Flux2Config, Flux2Transformer
from dopsd_jax.models.flux2_denoiser import Flux2Denoiser
from dopsd_jax.models.flux2_vae import Flux2VaeConfig
from dopsd_jax.models.qwen3 import Qwen3Config
from dopsd_jax.weights.flux2_names import (
    FLUX2_TARGETS,
    flux2_bfl_table,
    flux2_modules,
    flux2_table,
)
from dopsd_jax.weights.vae_names import FLUX2_VAE


def empirical_shift(num_steps: int, num_tokens: int) -> float:
    """The shift s = e^mu of FLUX.2: larger pictures spend longer in the noise.

    Args:
        num_steps: S.
        num_tokens: Image tokens of the picture that is drawn; references do not count.

    Source: diffusers Flux2KleinPipeline, `compute_empirical_mu`, for an exponential time shift,
        e^mu / (e^mu + 1 / u - 1), which is `flow.sigmas_shifted`.
    """
    slope10, bias10 = 8.73809524e-05, 1.89833333
    slope200, bias200 = 0.00016927, 0.45666666
    mu200 = slope200 * num_tokens + bias200
    if num_tokens > 4300:
        return math.exp(mu200)
    mu10 = slope10 * num_tokens + bias10
    # A line in S through the values measured at 10 and at 200 steps.
    slope = (mu200 - mu10) / 190.0
    return math.exp(slope * num_steps + mu200 - 200.0 * slope)


FLUX2 = Family(
    pipeline="Flux2KleinPipeline",
    config=Flux2Config,
    network=Flux2Transformer,
    denoiser=Flux2Denoiser,
    names=NAMES,
    table=flux2_table,
    other_tables=(flux2_bfl_table,),
    modules=flux2_modules,
    targets=FLUX2_TARGETS,
    text=lambda config: TextRules((9, 18, 27), False, (512,), attends_pads=True),
    vae=FLUX2_VAE,
    published={
        "flux2_klein_4b": Flux2Config.klein_4b(), "flux2_klein_9b": Flux2Config.klein_9b(),
    },
    encoders={
        "flux2_klein_4b": (Qwen3Config.qwen3_4b(), Flux2VaeConfig.klein()),
        "flux2_klein_9b": (Qwen3Config.qwen3_8b(), Flux2VaeConfig.klein()),
    },
    elsewhere=Elsewhere(
        hub={"flux2_klein_4b": "black-forest-labs/FLUX.2-klein-4B",
             "flux2_klein_9b": "black-forest-labs/FLUX.2-klein-9B"},
        spec={"flux2_klein_4b": "Flux.2-klein-4b", "flux2_klein_9b": "Flux.2-klein-9b"},
        arguments={"guidance_scale": 1.0},
    ),
    shift=empirical_shift,
    is_distilled=lambda index, shift: index.get("is_distilled", False),
)
