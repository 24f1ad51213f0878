"""What a pipeline directory holds, family by family: networks, tensor names, rules of its text.

`model_index.json` names the family. Everything here is known from the configs alone; weights are
read by weights/pipeline.py, alike for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dopsd_jax.core import trees
from dopsd_jax.core.checks import POSITIVE, value_problems
from dopsd_jax.core.log import log
from dopsd_jax.core.trees import Tree
from dopsd_jax.models.denoiser import Denoiser, Flux2Denoiser, ZImageDenoiser
from dopsd_jax.models.flux2 import Flux2Config, Flux2Transformer
from dopsd_jax.models.flux2_vae import Flux2Vae, Flux2VaeConfig
from dopsd_jax.models.qwen3 import Qwen3, Qwen3Config
from dopsd_jax.models.vae import Vae, VaeConfig
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.weights.flux2_names import (
    FLUX2_MODULES,
    FLUX2_TARGETS,
    flux2_bfl_table,
    flux2_table,
)
from dopsd_jax.weights.names import Modules, Rule, WeightsError
from dopsd_jax.weights.qwen3_names import qwen3_table
from dopsd_jax.weights.vae_names import (
    decoder_table,
    flux2_decoder_table,
    flux2_vae_table,
    vae_table,
)
from dopsd_jax.weights.z_image_names import Z_IMAGE_MODULES, Z_IMAGE_TARGETS, z_image_table

FLUX2_TAPS = (9, 18, 27)
DECODER = "vae_decoder"  # instead of "vae": latents to images alone


@dataclasses.dataclass(frozen=True)
class TextRules:
    """How a family turns prompts into features.

    Attributes:
        taps: Depths of the text encoder whose outputs stand side by side in the features.
        enable_thinking: Of the chat template.
        lengths: Padded lengths to choose from, ascending.
        attends_pads: Whether the denoiser attends to the features of pads: then the picture
            depends on the padded length, and `lengths` is a single one.
    """

    taps: tuple[int, ...]
    enable_thinking: bool
    lengths: tuple[int, ...]
    attends_pads: bool


@dataclasses.dataclass(frozen=True)
class LoraRules:
    """LoRA of a family.

    Attributes:
        targets: Regexes over parameter names by preset, see lora.PRESETS.
        modules: How files name its Linears.
    """

    targets: dict[str, tuple[str, ...]]
    modules: Modules


LORA_RULES = (
    LoraRules(Z_IMAGE_TARGETS, Z_IMAGE_MODULES), LoraRules(FLUX2_TARGETS, FLUX2_MODULES),
)
Z_IMAGE_LORA, FLUX2_LORA = LORA_RULES


def lora_rules_of(tree: Tree) -> LoraRules:
    """The rules of the family that a LoRA's names belong to, or most of them."""
    paths = {name.rpartition("/")[0] for name in trees.flatten(tree)}
    return max(LORA_RULES, key=lambda rules: len(paths & {r.target for r in rules.modules}))


@dataclasses.dataclass(frozen=True)
class Networks:
    """A pipeline without weights.

    Attributes:
        denoiser, vae, text_encoder: See `Pipeline`.
        text: Rules of its prompts.
        shift: The scheduler's static shift, or None where it depends on the picture's size.
        tables: Name table of each part.
        lora: Targets and names of its LoRA.
    """

    denoiser: Denoiser
    vae: Vae
    text_encoder: Qwen3
    text: TextRules
    shift: float | None
    tables: dict[str, list[Rule]]
    lora: LoraRules


@dataclasses.dataclass(frozen=True)
class Source:
    """A pipeline directory and how to compute what stands in it.

    Attributes:
        directory: For messages.
        index: model_index.json; its _class_name is the family.
        read: (part, from_json) -> what from_json makes of the config of transformer, vae,
            text_encoder or scheduler. Its WeightsError names the file.
        dtype: Compute of transformer and text encoder.
        vae_dtype: Compute of the VAE.
        remat: Rematerialisation policy of the transformer, see models/layers.py.
    """

    directory: Path
    index: dict
    read: Callable[[str, Callable[[dict], Any]], Any]
    dtype: jnp.dtype
    vae_dtype: jnp.dtype
    remat: str


def z_image(source: Source) -> Networks:
    """Tongyi-MAI/Z-Image-Turbo and Z-Image."""
    config = source.read("transformer", ZImageConfig.from_json)
    text_config = source.read("text_encoder", Qwen3Config.from_json)
    vae_config = source.read("vae", VaeConfig.from_json)
    _check_widths(
        source, vae_config.latent_channels, config.in_channels, text_config.hidden_size,
        config.cap_feat_dim,
    )
    # The feature is the residual stream before the last layer, which is therefore never run.
    depth = text_config.num_layers - 1
    return Networks(
        denoiser=ZImageDenoiser(
            ZImageTransformer(config, source.dtype, source.remat), vae_config.factor
        ),
        vae=Vae(vae_config, source.vae_dtype),
        text_encoder=Qwen3(text_config, depth, source.dtype),
        # Fewer tokens for short prompts, few programs to compile, and the same picture, because
        # whatever lies beyond the next 32 tokens is masked.
        text=TextRules((depth,), True, (64, 128, 256, 512), attends_pads=False),
        shift=source.read("scheduler", lambda values: _shift(values, dynamic=False)),
        tables={"transformer": z_image_table(config), "vae": vae_table(vae_config),
                DECODER: decoder_table(vae_config),
                "text_encoder": qwen3_table(text_config, depth)},
        lora=Z_IMAGE_LORA,
    )


def flux2(source: Source) -> Networks:
    """FLUX.2-klein-4B and 9B."""
    config = source.read("transformer", Flux2Config.from_json)
    text_config = source.read("text_encoder", Qwen3Config.from_json)
    vae_config = source.read("vae", Flux2VaeConfig.from_json)
    _check_widths(
        source, vae_config.normalised_channels, config.in_channels,
        len(FLUX2_TAPS) * text_config.hidden_size, config.joint_attention_dim,
    )
    depth = max(FLUX2_TAPS)
    if text_config.num_layers < depth:
        raise WeightsError(
            f"{source.directory}: the text encoder has {text_config.num_layers} layers, its "
            f"features are taken after layers {FLUX2_TAPS}"
        )
    if not source.index.get("is_distilled", False):
        log.warning("%s: not step-distilled, so made for guidance, which is not done here",
                    source.directory)
    return Networks(
        denoiser=Flux2Denoiser(
            Flux2Transformer(config, source.dtype, source.remat), vae_config.factor
        ),
        vae=Flux2Vae(vae_config, source.vae_dtype),
        text_encoder=Qwen3(text_config, depth, source.dtype),
        text=TextRules(FLUX2_TAPS, False, (512,), attends_pads=True),
        shift=source.read("scheduler", lambda values: _shift(values, dynamic=True)),
        tables={"transformer": [*flux2_table(config), *flux2_bfl_table(config)],
                "vae": flux2_vae_table(vae_config),
                DECODER: flux2_decoder_table(vae_config),
                "text_encoder": qwen3_table(text_config, depth)},
        lora=FLUX2_LORA,
    )


def transformer_table(denoiser: Denoiser) -> list[Rule]:
    """The name table of a denoiser's network."""
    config = denoiser.network.config
    return (z_image_table if isinstance(config, ZImageConfig) else flux2_table)(config)


FAMILIES = {"ZImagePipeline": z_image, "Flux2KleinPipeline": flux2}


def open_networks(source: Source) -> Networks:
    """The networks of a pipeline directory.

    Raises:
        WeightsError: An unknown family, unsupported values, or parts that do not fit one another.
    """
    name = source.index.get("_class_name")
    if name not in FAMILIES:
        raise WeightsError(
            f"{source.directory}/model_index.json: expected one of {', '.join(FAMILIES)}, got "
            f"{name!r}"
        )
    return FAMILIES[name](source)


def _check_widths(
    source: Source, vae: int, transformer: int, text: int, transformer_text: int
) -> None:
    problems = []
    if vae != transformer:
        problems.append(f"the VAE has {vae} latent channels, the transformer takes {transformer}")
    if text != transformer_text:
        problems.append(
            f"the text features are {text} wide, the transformer takes {transformer_text}"
        )
    if problems:
        raise WeightsError(f"{source.directory}: " + "; ".join(problems))


def _shift(values: dict, *, dynamic: bool) -> float | None:
    """The static shift of a scheduler_config.json, None of a dynamic one."""
    fixed = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": dynamic}
    absent = {"_class_name": fixed["_class_name"], "use_dynamic_shifting": False}
    if dynamic:
        fixed["time_shift_type"] = absent["time_shift_type"] = "exponential"
    wrong = [f"{k}: expected {v!r}, got {values.get(k, absent[k])!r}" for k, v in fixed.items()
             if values.get(k, absent[k]) != v]
    unsupported = ("shift_terminal", "invert_sigmas", "stochastic_sampling", "use_karras_sigmas",
                   "use_exponential_sigmas", "use_beta_sigmas")
    wrong += [f"{k}: not supported, got {values[k]!r}" for k in unsupported if values.get(k)]
    values = {"shift": 1.0, **values}
    wrong += value_problems(values, {"shift": POSITIVE}).values()
    if wrong:
        raise WeightsError("; ".join(wrong))
    return None if dynamic else float(values["shift"])


# Networks of published checkpoints, for plans without their files.
PUBLISHED: dict[str, Callable[[jnp.dtype, str], Denoiser]] = {
    "z_image_turbo": lambda dtype, remat: ZImageDenoiser(
        ZImageTransformer(ZImageConfig.turbo(), dtype, remat)
    ),
    "flux2_klein_4b": lambda dtype, remat: Flux2Denoiser(
        Flux2Transformer(Flux2Config.klein_4b(), dtype, remat)
    ),
    "flux2_klein_9b": lambda dtype, remat: Flux2Denoiser(
        Flux2Transformer(Flux2Config.klein_9b(), dtype, remat)
    ),
}


def published_denoiser(name: str, dtype: jnp.dtype, remat: str) -> Denoiser:
    """The network of a published checkpoint, by a name of PUBLISHED; it has no weights."""
    return PUBLISHED[name](dtype, remat)
