"""Tensor names of the Z-Image transformer in diffusers' layout."""

from __future__ import annotations

from dopsd_jax.models.z_image import ZImageConfig
from dopsd_jax.weights.names import LINEAR, SAME, Modules, Rule, rule

STACKS = "layers|noise_refiner|context_refiner"
BLOCK_NORMS = "attention_norm1|attention_norm2|ffn_norm1|ffn_norm2"

Z_IMAGE_BLOCK = {
    "attention.to_q": "attention/to_q",
    "attention.to_k": "attention/to_k",
    "attention.to_v": "attention/to_v",
    "attention.to_out.0": "attention/to_out",
    "feed_forward.w1": "feed_forward/w1",
    "feed_forward.w2": "feed_forward/w2",
    "feed_forward.w3": "feed_forward/w3",
    "adaLN_modulation.0": "adaLN_modulation",
}
Z_IMAGE_REST = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_modulation",
    "t_embedder.mlp.0": "t_embedder/mlp_0",
    "t_embedder.mlp.2": "t_embedder/mlp_2",
    "cap_embedder.1": "cap_embedder",
}
Z_IMAGE_MODULES = Modules((
    *(
        rule(f"{stack}.{{layer}}.{module}", f"{stack}/{path}")
        for stack in ("layers", "noise_refiner", "context_refiner")
        for module, path in Z_IMAGE_BLOCK.items()
        if not (stack == "context_refiner" and path == "adaLN_modulation")
    ),
    *(rule(module, path) for module, path in Z_IMAGE_REST.items()),
    # A SiLU, listed as unused: PEFT refuses a suffix that hits it, see lora_files.
    rule("all_final_layer.2-1.adaLN_modulation.0", None),
), "diffusion_model.")

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
        *linear(f"{block}.adaLN_modulation.0", "{stack}/adaLN_modulation", stack=STACKS),
    ]
