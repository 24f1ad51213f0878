"""Tensor names of the image autoencoders in diffusers' layout."""

from __future__ import annotations

from dopsd_jax.models import flux2_vae
from dopsd_jax.models.family import VaeKind
from dopsd_jax.models.flux2_vae import Flux2Vae, Flux2VaeConfig
from dopsd_jax.models.vae import Vae, VaeConfig
from dopsd_jax.weights.names import CONV, LINEAR, SAME, Rule, Transform, rule

SIDES = "encoder|decoder"


def decoder_table(config: VaeConfig | Flux2VaeConfig) -> list[Rule]:
    """As `vae_table`, but the encoder's tensors are left unused."""
    table = vae_table(config, "decoder")
    return [
        *(r for r in table if not r.target.startswith("encoder")),
        rule("encoder.{rest}", None, rest=".+"),
    ]


def flux2_vae_table(config: Flux2VaeConfig) -> list[Rule]:
    """The name table of an AutoencoderKLFlux2: the conv network, quant convs and statistics."""
    return [*vae_table(config), *_around("quant_conv|post_quant_conv")]


def flux2_decoder_table(config: Flux2VaeConfig) -> list[Rule]:
    """As `flux2_vae_table`, but what only encodes is left unused."""
    return [
        *decoder_table(config), *_around("post_quant_conv"),
        rule("quant_conv.{p}", None, p="weight|bias"),
    ]


def _around(convs: str) -> list[Rule]:
    """The 1 x 1 convolutions and the statistics around the conv network of FLUX.2."""
    return [
        rule("{p}.weight", "{p}/kernel", CONV, p=convs),
        rule("{p}.bias", "{p}/bias", p=convs),
        rule("bn.running_{p}", "bn_{p}", p="mean|var"),
        rule("bn.num_batches_tracked", None),
    ]


def vae_table(config: VaeConfig | Flux2VaeConfig, sides: str = SIDES) -> list[Rule]:
    """The name table of the conv network; the number of resolutions bounds the block indices."""
    levels = len(config.block_out_channels)
    level = "|".join(str(i) for i in range(levels))
    resampled = "|".join(str(i) for i in range(levels - 1))  # all but the last

    def affine(
        tensor: str, target: str, weight: str, transform: Transform = SAME, **groups: str
    ) -> list[Rule]:
        return [
            rule(f"{tensor}.weight", f"{target}/{weight}", transform, **groups),
            rule(f"{tensor}.bias", f"{target}/bias", SAME, **groups),
        ]

    def resnet(tensor: str, target: str, **groups: str) -> list[Rule]:
        return [
            *affine(f"{tensor}.{{p}}", f"{target}/{{p}}", "scale", p="norm1|norm2", **groups),
            *affine(f"{tensor}.{{p}}", f"{target}/{{p}}", "kernel", CONV,
                    p="conv1|conv2|conv_shortcut", **groups),
        ]

    middle, middle_target = "{side}.mid_block", "{side}/mid_block"
    attention, attention_target = f"{middle}.attentions.0", f"{middle_target}/attentions_0"
    return [
        *affine("{side}.{p}", "{side}/{p}", "kernel", CONV, side=sides, p="conv_in|conv_out"),
        *affine("{side}.conv_norm_out", "{side}/conv_norm_out", "scale", side=sides),
        *resnet("encoder.down_blocks.{i}.resnets.{j}", "encoder/down_blocks_{i}/resnets_{j}",
                i=level),
        *affine("encoder.down_blocks.{i}.downsamplers.0.conv",
                "encoder/down_blocks_{i}/downsamplers_0", "kernel", CONV, i=resampled),
        *resnet("decoder.up_blocks.{i}.resnets.{j}", "decoder/up_blocks_{i}/resnets_{j}", i=level),
        *affine("decoder.up_blocks.{i}.upsamplers.0.conv",
                "decoder/up_blocks_{i}/upsamplers_0", "kernel", CONV, i=resampled),
        *resnet(f"{middle}.resnets.{{j}}", f"{middle_target}/resnets_{{j}}", side=sides),
        *affine(f"{attention}.group_norm", f"{attention_target}/group_norm", "scale", side=sides),
        *affine(f"{attention}.{{p}}", f"{attention_target}/{{p}}", "kernel", LINEAR,
                side=sides, p="to_q|to_k|to_v"),
        *affine(f"{attention}.to_out.0", f"{attention_target}/to_out_0", "kernel", LINEAR,
                side=sides),
    ]


PLAIN_VAE = VaeKind(
    VaeConfig, Vae, lambda config: config.latent_channels, vae_table, decoder_table
)
FLUX2_VAE = VaeKind(
    Flux2VaeConfig, Flux2Vae, lambda config: config.normalised_channels, flux2_vae_table,
    flux2_decoder_table, flux2_vae.NAMES,
)
