"""What is known of a model family, in one object, and what to write for another one.

A family is a text-to-image network together with its VAE, its text encoder and the names of their
tensors. Nothing else of the package, but bench/, knows a family by name: whoever needs a fact asks
the `Family` that `weights.families.find` returns for the class name in a model_index.json or for
the config of a network. To add one, write

1. the network, as a module of models/: a Flax module with the fields `config`, `dtype` and `remat`
   and the methods `smallest_inputs` and `check_sizes`. Its linear layers are `layers.Dense`, its
   layers are stacked by `layers.scan_layers`. Beside it stand its `ParamNames`, which place its
   parameters on a mesh and say what rematerialisation keeps, and the class behind which the method
   sees the network, a `denoiser.Denoiser`;
2. the names of its tensors, as a module of weights/: the name table, from which everything that
   bears the names of files is derived, the LoRA modules and the stacks of layers included, and the
   LoRA targets by preset;
3. the `Family`, as a module of weights/, and its line in weights/families.py: `register(FAMILY)`.

A family whose text encoder is not Qwen3 needs more: `weights.pipeline.Pipeline` has one of those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp

from dopsd_jax.models.denoiser import Denoiser
from dopsd_jax.models.layers import ParamNames
from dopsd_jax.models.qwen3 import Qwen3Config

if TYPE_CHECKING:  # the package weights imports this module
    from dopsd_jax.weights.names import Modules, Rule


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
class VaeKind:
    """An image autoencoder, which families may share.

    Attributes:
        config: Class with `from_json`.
        network: (config, dtype) -> the network.
        channels: Of the latents that a denoiser sees, by the config.
        table: Name table by the config.
        decoder_table: The same where only latents are decoded.
        names: What sharding needs to know of its parameters.
    """

    config: type
    network: Callable[[Any, jnp.dtype], nn.Module]
    channels: Callable[[Any], int]
    table: Callable[[Any], list[Rule]]
    decoder_table: Callable[[Any], list[Rule]]
    names: ParamNames = dataclasses.field(default_factory=ParamNames)


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """What others call a family's published checkpoints, by the names of `Family.published`.

    Attributes:
        hub: Repository on the hub.
        spec: Architecture in Stability AI's model spec, as kohya-ss writes it.
        arguments: What diffusers' pipeline is called with besides prompt, size and steps.
    """

    hub: Mapping[str, str] = dataclasses.field(default_factory=dict)
    spec: Mapping[str, str] = dataclasses.field(default_factory=dict)
    arguments: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """All facts of a model family; a `config` is the transformer's.

    Attributes:
        pipeline: The `_class_name` of model_index.json.
        config: Class of the transformer's config, of no other family; with `from_json`, and `dim`,
            `in_channels` among its fields.
        network: (config, dtype, remat) -> the transformer.
        denoiser: (network, pixels_per_latent) -> the adapter that the method calls. It also counts
            tokens for FLOPs, see `Denoiser.passes`.
        names: What sharding and rematerialisation need to know of the transformer.
        table: Name table of the transformer in diffusers' layout, in which it is written too.
        other_tables: Name tables of other layouts that are read, such as its makers' single file,
            as far as they name a tensor otherwise; no name may be one of `table`.
        modules: What LoRA files call its linear layers, see `weights.names.linear_modules`.
        targets: LoRA targets, regexes over parameter names by preset, see `lora.PRESETS`.
        text: Rules of its prompts, by the text encoder's config.
        vae: Its autoencoder.
        published: Configs of published checkpoints by name, which are planned for without their
            files; the first stands for the family where no model is at hand.
        encoders: Configs of the text encoder and of the VAE of a published checkpoint, by the same
            names; without them only its train step is planned for without files.
        shift: (steps, image tokens) -> the sampler's shift. None: one number, which
            scheduler_config.json holds.
        is_distilled: (model_index.json, static shift) -> whether the model is step-distilled;
            others are made for guidance.
        unguided: The guidance scale at which its pipeline draws from the prompt alone, so that the
            velocity is negative + (scale + 1 - unguided) (positive - negative).
        elsewhere: What its checkpoints are called elsewhere, for what is exported.
    """

    pipeline: str
    config: type
    network: Callable[[Any, jnp.dtype, str], nn.Module]
    denoiser: Callable[..., Denoiser]
    names: ParamNames
    table: Callable[[Any], list[Rule]]
    modules: Callable[[Any], Modules]
    targets: Mapping[str, tuple[str, ...]]
    text: Callable[[Qwen3Config], TextRules]
    vae: VaeKind
    published: Mapping[str, Any]
    encoders: Mapping[str, tuple[Qwen3Config, Any]] = dataclasses.field(default_factory=dict)
    other_tables: tuple[Callable[[Any], list[Rule]], ...] = ()
    shift: Callable[[int, int], float] | None = None
    is_distilled: Callable[[dict, float | None], bool] = lambda index, shift: True
    unguided: float = 1.0
    elsewhere: Elsewhere = Elsewhere()
