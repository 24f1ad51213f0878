"""The registry of model families, and what a pipeline directory of any of them holds.

`model_index.json` names the family. Everything here is known from the configs alone; weights are
read by weights/pipeline.py, alike for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dopsd_jax.core import sharding
from dopsd_jax.core.checks import POSITIVE, value_problems
from dopsd_jax.core.trees import Tree
from dopsd_jax.models import adapters, qwen3, qwen3_vl
from dopsd_jax.models.denoiser import Denoiser
from dopsd_jax.models.family import Family, TextRules
from dopsd_jax.models.layers import ParamNames
from dopsd_jax.models.qwen3 import Qwen3, Qwen3Config
from dopsd_jax.weights.flux2 import FLUX2
from dopsd_jax.weights.names import Modules, Rule, WeightsError
from dopsd_jax.weights.qwen3_names import qwen3_table
from dopsd_jax.weights.z_image import Z_IMAGE

DECODER = "vae_decoder"  # instead of "vae": latents to images alone
FAMILIES: dict[str, Family] = {}  # by `pipeline`
# (family, config) of published checkpoints by name.
PUBLISHED: dict[str, tuple[Family, Any]] = {}


def register(family: Family) -> None:
    """Makes a family known to everything that opens, trains, plans or exports a model.

    Raises:
        ValueError: Its `pipeline`, its config's class or a name of `published` is taken, or one of
            its parameters' names has another place on a mesh already.
    """
    taken = [f.pipeline for f in FAMILIES.values() if f.config is family.config]
    taken += sorted(PUBLISHED.keys() & family.published.keys())
    if family.pipeline in FAMILIES:
        taken.append(family.pipeline)
    if taken or not family.published:
        raise ValueError(
            f"family {family.pipeline}: expected a pipeline, a config class and at least one "
            f"published name of its own, got {', '.join(taken) or 'no published name'}"
        )
    for names in (family.names, family.vae.names):
        _add_names(names)
    FAMILIES[family.pipeline] = family
    PUBLISHED.update({name: (family, config) for name, config in family.published.items()})


def _add_names(names: ParamNames) -> None:
    sharding.add_names(names.columns, names.rows, names.whole)


def find(key: Any, where: str | Path = "model family") -> Family:
    """The family of a model.

    Args:
        key: The `_class_name` of its model_index.json, or the config of its transformer.
        where: The file or directory that says so, for the message.

    Raises:
        WeightsError: No registered family has it.
    """
    for family in FAMILIES.values():
        if key == family.pipeline or isinstance(key, family.config):
            return family
    raise WeightsError(f"{where}: expected one of {', '.join(FAMILIES)}, got {key!r:.200}")


def example(family: Family) -> Any:
    """The config that stands for a family where no model is at hand."""
    return next(iter(family.published.values()))


def family_of_tree(tree: Tree) -> Family:
    """The family that the names of a LoRA belong to, or most of them.

    Raises:
        WeightsError: No family has any of these names.
    """
    paths = set(adapters.sites(tree))
    shared = {
        name: len(paths & {r.target for r in family.modules(example(family))})
        for name, family in FAMILIES.items()
    }
    best = max(shared, key=shared.get)
    if not shared[best]:
        raise WeightsError(
            f"expected linear layers of one of {', '.join(FAMILIES)}, got "
            f"{', '.join(sorted(paths)[:5]) or 'none'}"
        )
    return FAMILIES[best]


_add_names(qwen3.NAMES)  # of the text encoder of all families, and of the vision tower
_add_names(qwen3_vl.NAMES)
register(Z_IMAGE)
register(FLUX2)


@dataclasses.dataclass(frozen=True)
class LoraRules:
    """LoRA of a model.

    Attributes:
        targets: Regexes over parameter names by preset, see lora.PRESETS.
        modules: How files name its Linears.
    """

    targets: Mapping[str, tuple[str, ...]]
    modules: Modules


@dataclasses.dataclass(frozen=True)
class Networks:
    """A pipeline without weights.

    Attributes:
        family: Which family the networks are of.
        denoiser, vae, text_encoder: See `Pipeline`.
        text: Rules of its prompts.
        shift: The scheduler's static shift, or None where it depends on the picture's size.
        distilled: Whether the model is step-distilled.
        tables: Name table of each part.
        lora: Targets and names of its LoRA.
    """

    family: Family
    denoiser: Denoiser
    vae: nn.Module
    text_encoder: Qwen3
    text: TextRules
    shift: float | None
    distilled: bool
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


def open_networks(source: Source) -> Networks:
    """The networks of a pipeline directory.

    Raises:
        WeightsError: An unknown family, unsupported values, or parts that do not fit one another.
    """
    family = find(source.index.get("_class_name"), source.directory / "model_index.json")
    config = source.read("transformer", family.config.from_json)
    text_config = source.read("text_encoder", Qwen3Config.from_json)
    vae_config = source.read("vae", family.vae.config.from_json)
    text = family.text(text_config)
    network = family.network(config, source.dtype, source.remat)
    denoiser = family.denoiser(network, vae_config.factor)
    _check_widths(
        source, family.vae.channels(vae_config), config.in_channels,
        len(text.taps) * text_config.hidden_size, denoiser.text_width,
    )
    depth = max(text.taps)
    if text_config.num_layers < depth:
        raise WeightsError(
            f"{source.directory}: the text encoder has {text_config.num_layers} layers, its "
            f"features are taken after layers {text.taps}"
        )
    dynamic = family.shift is not None
    shift = source.read("scheduler", lambda values: _shift(values, dynamic=dynamic))
    return Networks(
        family=family,
        denoiser=denoiser,
        vae=family.vae.network(vae_config, source.vae_dtype),
        text_encoder=Qwen3(text_config, depth, source.dtype),
        text=text,
        shift=shift,
        distilled=family.is_distilled(source.index, shift),
        tables={
            "transformer": _every_layout(family, config),
            "vae": family.vae.table(vae_config),
            DECODER: family.vae.decoder_table(vae_config),
            "text_encoder": qwen3_table(text_config, depth),
        },
        lora=LoraRules(family.targets, family.modules(config)),
    )


def _every_layout(family: Family, config: Any) -> list[Rule]:
    """The name table of a transformer in all layouts that are read."""
    return [r for table in (family.table, *family.other_tables) for r in table(config)]


def other_transformers(family: Family) -> dict[str, list[Rule]]:
    """Name tables of the transformers of all other families, by `pipeline`."""
    return {name: _every_layout(other, example(other)) for name, other in FAMILIES.items()
            if other is not family}


def transformer_table(denoiser: Denoiser) -> list[Rule]:
    """The name table of a denoiser's network, in the layout in which it is written."""
    config = denoiser.network.config
    return find(config).table(config)


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


def published_denoiser(name: str, dtype: jnp.dtype, remat: str) -> Denoiser:
    """The network of a published checkpoint, by a name of PUBLISHED; it has no weights."""
    family, config = PUBLISHED[name]
    return family.denoiser(family.network(config, dtype, remat))


def published_encoders(
    name: str, dtype: jnp.dtype, vae_dtype: jnp.dtype
) -> tuple[Qwen3, TextRules, nn.Module]:
    """Text encoder, its rules and VAE of a published checkpoint; they have no weights.

    Raises:
        ValueError: Their sizes are not known, see `Family.encoders`.
    """
    family, _ = PUBLISHED[name]
    if name not in family.encoders:
        raise ValueError(f"published = {name}: the sizes of its text encoder and VAE are known "
                         "from its files alone; give config.model")
    text_config, vae_config = family.encoders[name]
    text = family.text(text_config)
    return (Qwen3(text_config, max(text.taps), dtype), text,
            family.vae.network(vae_config, vae_dtype))
