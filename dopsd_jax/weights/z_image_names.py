"""Tensor names of the Z-Image transformer in diffusers' layout and in its makers' own."""

from __future__ import annotations

from dopsd_jax.models.z_image import ZImageConfig
from dopsd_jax.weights.names import LINEAR, SAME, Modules, Rule, linear_modules, rule

MODULATED = "layers|noise_refiner"
STACKS = f"{MODULATED}|context_refiner"
BLOCK_NORMS = "attention_norm1|attention_norm2|ffn_norm1|ffn_norm2"

# LoRA targets by preset: regexes over parameter names. "published" is what D-OPSD's list matches:
# 238 linears, both refiners among them.
Z_IMAGE_TARGETS = {
    "published": (
        r".*/attention/(to_q|to_k|to_v|to_out)/kernel",
        r".*/feed_forward/(w1|w2|w3)/kernel",
    ),
    "attention": (r".*/attention/(to_q|to_k|to_v|to_out)/kernel",),
    "all": (r".*/(attention|feed_forward)/[^/]+/kernel",),
}


def z_image_table(config: ZImageConfig) -> list[Rule]:
    """The name table; the patch size stands in two of the names."""
    size = f"{config.patch_size}-1"

    def linear(tensor: str, target: str, **groups: str) -> list[Rule]:
        return [
            rule(f"{tensor}.weight", f"{target}/kernel", LINEAR, **groups),
            rule(f"{tensor}.bias", f"{target}/bias", SAME, **groups),
        ]

    block = "{stack}.{layer}"
    return [
        rule("{pad}", "{pad}", pad="x_pad_token|cap_pad_token"),
        *linear(f"all_x_embedder.{size}", "x_embedder"),
        *linear(f"all_final_layer.{size}.linear", "final_linear"),
        *linear(f"all_final_layer.{size}.adaLN_modulation.1", "final_modulation"),
        *linear("t_embedder.mlp.{i}", "t_embedder/mlp_{i}", i="0|2"),
        rule("cap_embedder.0.weight", "cap_norm/scale"),
        *linear("cap_embedder.1", "cap_embedder"),
        rule(f"{block}.attention.{{p}}.weight", "{stack}/attention/{p}/kernel", LINEAR,
             stack=STACKS, p="to_q|to_k|to_v"),
        rule(f"{block}.attention.to_out.0.weight", "{stack}/attention/to_out/kernel", LINEAR,
             stack=STACKS),
        rule(f"{block}.attention.{{p}}.weight", "{stack}/attention/{p}/scale",
             stack=STACKS, p="norm_q|norm_k"),
        rule(f"{block}.feed_forward.{{p}}.weight", "{stack}/feed_forward/{p}/kernel", LINEAR,
             stack=STACKS, p="w1|w2|w3"),
        rule(f"{block}.{{p}}.weight", "{stack}/{p}/scale", stack=STACKS, p=BLOCK_NORMS),
        *linear(f"{block}.adaLN_modulation.0", "{stack}/adaLN_modulation", stack=MODULATED),
    ]


def z_image_modules(config: ZImageConfig) -> Modules:
    """What LoRA files call its linear layers; the SiLU before the last modulation is none."""
    return linear_modules(
        z_image_table(config), "diffusion_model.",
        idle=[f"all_final_layer.{config.patch_size}-1.adaLN_modulation.0"],
        makers=z_image_makers_table(config),
    )


def z_image_makers_table(config: ZImageConfig) -> list[Rule]:
    """What the makers' own layout calls otherwise, as ComfyUI's files have it.

    Projections to q, k and v are one tensor there. With `z_image_table` it names a whole file; no
    name is one of both.

    Source: diffusers `convert_z_image_transformer_checkpoint_to_diffusers`.
    """
    del config  # no size stands in these names

    def linear(tensor: str, target: str) -> list[Rule]:
        return [rule(f"{tensor}.weight", f"{target}/kernel", LINEAR),
                rule(f"{tensor}.bias", f"{target}/bias")]

    block = "{stack}.{layer}.attention"
    return [
        *linear("x_embedder", "x_embedder"),
        *linear("final_layer.linear", "final_linear"),
        *linear("final_layer.adaLN_modulation.1", "final_modulation"),
        rule(f"{block}.qkv.weight#{{part}}", "{stack}/attention/{part}/kernel", LINEAR,
             stack=STACKS, part="to_q|to_k|to_v"),
        rule(f"{block}.out.weight", "{stack}/attention/to_out/kernel", LINEAR, stack=STACKS),
        rule(f"{block}.{{p}}_norm.weight", "{stack}/attention/norm_{p}/scale", stack=STACKS,
             p="q|k"),
        rule("norm_final.weight", None),  # of some files; no layer uses it
    ]
