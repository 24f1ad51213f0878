"""Tensor names of the image autoencoders in diffusers' layout and in their makers' own."""

from __future__ import annotations

from dopsd_jax.models import flux2_vae
from dopsd_jax.models.family import VaeKind
from dopsd_jax.models.flux2_vae import Flux2Vae, Flux2VaeConfig
from dopsd_jax.models.vae import Vae, VaeConfig
from dopsd_jax.weights.names import CONV, LINEAR, SAME, Rule, Transform, rule

SIDES = "encoder|decoder"
ENCODER = rule("encoder.{rest}", None, rest=".+")
# A 1 x 1 convolution as (out, in, 1, 1), where the network has a Dense.
POINTWISE = Transform(lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T[..., None, None])


def vae_table(config: VaeConfig | Flux2VaeConfig, sides: str = SIDES) -> list[Rule]:
    """The name table of the conv network, in both layouts; no name is one of both.

    The number of resolutions bounds the block indices.
    """
    levels = len(config.block_out_channels)
    return [
        *_affine("{side}.{p}", "{side}/{p}", "kernel", CONV, side=sides, p="conv_in|conv_out"),
        *_diffusers_rules(levels, sides), *_makers_rules(levels, sides),
    ]


def decoder_table(config: VaeConfig | Flux2VaeConfig) -> list[Rule]:
    """As `vae_table`, but the encoder's tensors are left unused."""
    return [*_without_encoder(vae_table(config, "decoder")), ENCODER]


def flux2_vae_table(config: Flux2VaeConfig) -> list[Rule]:
    """The name table of an AutoencoderKLFlux2: the conv network, quant convs and statistics."""
    return [*vae_table(config), *_quant_conv("encoder", "quant_conv"), *_after_encoder()]


def flux2_decoder_table(config: Flux2VaeConfig) -> list[Rule]:
    """As `flux2_vae_table`, but what only encodes is left unused."""
    return [
        *decoder_table(config), rule("quant_conv.{p}", None, p="weight|bias"), *_after_encoder(),
    ]


def _without_encoder(table: list[Rule]) -> list[Rule]:
    return [r for r in table if not r.target.startswith("encoder")]


def _after_encoder() -> list[Rule]:
    """Between the encoder of FLUX.2 and its decoder, less what only encodes."""
    return [
        *_quant_conv("decoder", "post_quant_conv"),
        rule("bn.running_{p}", "bn_{p}", p="mean|var"),
        rule("bn.num_batches_tracked", None),
    ]


def _quant_conv(side: str, name: str) -> list[Rule]:
    """A 1 x 1 convolution around the conv network; in the makers' layout a part of it."""
    return [r for tensor in (name, f"{side}.{name}")
            for r in _affine(tensor, name, "kernel", CONV)]


def _affine(
    tensor: str, target: str, weight: str, transform: Transform = SAME, **groups: str
) -> list[Rule]:
    return [
        rule(f"{tensor}.weight", f"{target}/{weight}", transform, **groups),
        rule(f"{tensor}.bias", f"{target}/bias", SAME, **groups),
    ]


def _resnet(tensor: str, target: str, shortcut: str = "conv_shortcut", **groups: str) -> list[Rule]:
    return [
        *_affine(f"{tensor}.{{p}}", f"{target}/{{p}}", "scale", p="norm1|norm2", **groups),
        *_affine(f"{tensor}.{{p}}", f"{target}/{{p}}", "kernel", CONV, p="conv1|conv2", **groups),
        *_affine(f"{tensor}.{shortcut}", f"{target}/conv_shortcut", "kernel", CONV, **groups),
    ]


def _diffusers_rules(levels: int, sides: str) -> list[Rule]:
    """What diffusers' layout calls otherwise than the makers'."""
    level = "|".join(str(i) for i in range(levels))
    resampled = "|".join(str(i) for i in range(levels - 1))  # all but the last
    middle, middle_target = "{side}.mid_block", "{side}/mid_block"
    attention, attention_target = f"{middle}.attentions.0", f"{middle_target}/attentions_0"
    return [
        *_affine("{side}.conv_norm_out", "{side}/conv_norm_out", "scale", side=sides),
        *_resnet("encoder.down_blocks.{i}.resnets.{j}", "encoder/down_blocks_{i}/resnets_{j}",
                 i=level),
        *_affine("encoder.down_blocks.{i}.downsamplers.0.conv",
                 "encoder/down_blocks_{i}/downsamplers_0", "kernel", CONV, i=resampled),
        *_resnet("decoder.up_blocks.{i}.resnets.{j}", "decoder/up_blocks_{i}/resnets_{j}", i=level),
        *_affine("decoder.up_blocks.{i}.upsamplers.0.conv",
                 "decoder/up_blocks_{i}/upsamplers_0", "kernel", CONV, i=resampled),
        *_resnet(f"{middle}.resnets.{{j}}", f"{middle_target}/resnets_{{j}}", side=sides),
        *_affine(f"{attention}.group_norm", f"{attention_target}/group_norm", "scale", side=sides),
        *_affine(f"{attention}.{{p}}", f"{attention_target}/{{p}}", "kernel", LINEAR,
                 side=sides, p="to_q|to_k|to_v"),
        *_affine(f"{attention}.to_out.0", f"{attention_target}/to_out_0", "kernel", LINEAR,
                 side=sides),
    ]


def _makers_rules(levels: int, sides: str) -> list[Rule]:
    """What the makers' layout calls otherwise, as in ae.safetensors.

    The decoder's levels count from the last to the first.

    Source: diffusers `convert_ldm_vae_checkpoint`.
    """
    rules = [
        *_affine("{side}.norm_out", "{side}/conv_norm_out", "scale", side=sides),
        *_affine("{side}.mid.attn_1.norm", "{side}/mid_block/attentions_0/group_norm", "scale",
                 side=sides),
        *_affine("{side}.mid.attn_1.{p}", "{side}/mid_block/attentions_0/to_{p}", "kernel",
                 POINTWISE, side=sides, p="q|k|v"),
        *_affine("{side}.mid.attn_1.proj_out", "{side}/mid_block/attentions_0/to_out_0", "kernel",
                 POINTWISE, side=sides),
    ]
    for j in (0, 1):
        rules += _resnet(f"{{side}}.mid.block_{j + 1}", f"{{side}}/mid_block/resnets_{j}",
                         "nin_shortcut", side=sides)
    for i in range(levels):
        down, up = f"encoder/down_blocks_{i}", f"decoder/up_blocks_{levels - 1 - i}"
        rules += [
            *_resnet(f"encoder.down.{i}.block.{{j}}", f"{down}/resnets_{{j}}", "nin_shortcut"),
            *_resnet(f"decoder.up.{i}.block.{{j}}", f"{up}/resnets_{{j}}", "nin_shortcut"),
        ]
        if i < levels - 1:
            rules += _affine(f"encoder.down.{i}.downsample.conv", f"{down}/downsamplers_0",
                             "kernel", CONV)
        if i > 0:
            rules += _affine(f"decoder.up.{i}.upsample.conv", f"{up}/upsamplers_0", "kernel", CONV)
    return rules


PLAIN_VAE = VaeKind(
    VaeConfig, Vae, lambda config: config.latent_channels, vae_table, decoder_table
)
FLUX2_VAE = VaeKind(
    Flux2VaeConfig, Flux2Vae, lambda config: config.normalised_channels, flux2_vae_table,
    flux2_decoder_table, flux2_vae.NAMES,
)
