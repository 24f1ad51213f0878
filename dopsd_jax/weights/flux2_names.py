"""Tensor names of the FLUX.2 transformer in diffusers' layout."""

from __future__ import annotations

from dopsd_jax.models.flux2 import Flux2Config
from dopsd_jax.weights.names import LINEAR, SAME, Rule, Transform, rule

MODULATIONS = (
    "double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation"
)
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


def flux2_table(config: Flux2Config) -> list[Rule]:
    """The name table; the depths bound the layer indices."""
    depths = {DOUBLE: config.num_layers, SINGLE: config.num_single_layers}

    def linear(tensor: str, target: str, **groups: str) -> Rule:
        return rule(f"{tensor}.weight", f"{target}/kernel", LINEAR, **groups)

    def layers(
        stack: str, tensor: str, target: str, transform: Transform = LINEAR, **groups: str
    ) -> Rule:
        layer = "|".join(str(i) for i in range(depths[stack]))
        return rule(
            f"{stack}.{{layer}}.{tensor}.weight", f"{stack}/{target}", transform, layer=layer,
            **groups,
        )

    return [
        linear("{p}", "{p}", p="x_embedder|context_embedder|proj_out"),
        linear("time_guidance_embed.timestep_embedder.{p}", "time_embedder/{p}",
               p="linear_1|linear_2"),
        linear("{p}.linear", "{p}", p=f"{MODULATIONS}|norm_out"),
        layers(DOUBLE, "attn.{p}", "attn/{p}/kernel",
               p="to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_add_out"),
        layers(DOUBLE, "attn.to_out.0", "attn/to_out/kernel"),
        layers(DOUBLE, "attn.{p}", "attn/{p}/scale", SAME,
               p="norm_q|norm_k|norm_added_q|norm_added_k"),
        layers(DOUBLE, "{ff}.{p}", "{ff}/{p}/kernel", ff="ff|ff_context",
               p="linear_in|linear_out"),
        layers(SINGLE, "attn.{p}", "attn/{p}/kernel", p="to_qkv_mlp_proj|to_out"),
        layers(SINGLE, "attn.{p}", "attn/{p}/scale", SAME, p="norm_q|norm_k"),
    ]
