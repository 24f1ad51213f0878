"""Tensor names of the FLUX.2 transformer in diffusers' layout and in its makers' own."""

from __future__ import annotations

from dopsd_jax.models.flux2 import Flux2Config
from dopsd_jax.weights.names import (
    LINEAR,
    LINEAR_SWAPPED,
    SAME,
    Modules,
    Rule,
    Transform,
    linear_modules,
    rule,
)

MODULATIONS = (
    "double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation"
)
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
PROJECTIONS = "to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_add_out"
ATTENTION = rf"{DOUBLE}/attn/({PROJECTIONS}|to_out)/kernel"
# LoRA targets by preset: regexes over parameter names. D-OPSD's list also names feed-forward layers
# of FLUX.1, which match nothing; "published" is what is left: 8 linears per two-stream block.
FLUX2_TARGETS = {
    "published": (ATTENTION,),
    "attention": (ATTENTION,),
    "all": (
        ATTENTION, rf"{DOUBLE}/(ff|ff_context)/(linear_in|linear_out)/kernel",
        rf"{SINGLE}/attn/(to_qkv_mlp_proj|to_out)/kernel",
    ),
}


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
        layers(DOUBLE, "attn.{p}", "attn/{p}/kernel", p=PROJECTIONS),
        layers(DOUBLE, "attn.to_out.0", "attn/to_out/kernel"),
        layers(DOUBLE, "attn.{p}", "attn/{p}/scale", SAME,
               p="norm_q|norm_k|norm_added_q|norm_added_k"),
        layers(DOUBLE, "{ff}.{p}", "{ff}/{p}/kernel", ff="ff|ff_context",
               p="linear_in|linear_out"),
        layers(SINGLE, "attn.{p}", "attn/{p}/kernel", p="to_qkv_mlp_proj|to_out"),
        layers(SINGLE, "attn.{p}", "attn/{p}/scale", SAME, p="norm_q|norm_k"),
    ]


def flux2_modules(config: Flux2Config) -> Modules:
    """What LoRA files call its linear layers.

    ComfyUI knows diffusers' module paths of this network behind "transformer." only. The list of
    modules that holds `to_out.0` has no weights.
    """
    return linear_modules(
        flux2_table(config), "transformer.", idle=[f"{DOUBLE}.{{layer}}.attn.to_out"],
        makers=flux2_bfl_table(config),
    )


def flux2_bfl_table(config: Flux2Config) -> list[Rule]:
    """The name table of the single file that Black Forest Labs ship, such as ComfyUI reads.

    Projections to q, k and v are one tensor there. No name is one of `flux2_table`.

    Source: diffusers `convert_flux2_transformer_checkpoint_to_diffusers`.
    """
    def linear(tensor: str, target: str, transform: Transform = LINEAR) -> Rule:
        return rule(f"{tensor}.weight", f"{target}/kernel", transform)

    def layers(stack: str, depth: int, tensor: str, target: str, leaf: str = "kernel",
               **groups: str) -> Rule:
        return rule(
            f"{stack}.{{layer}}.{tensor}", f"{target}/{leaf}",
            LINEAR if leaf == "kernel" else SAME,
            layer="|".join(str(i) for i in range(depth)), **groups,
        )

    rules = [
        linear("img_in", "x_embedder"), linear("txt_in", "context_embedder"),
        linear("time_in.in_layer", "time_embedder/linear_1"),
        linear("time_in.out_layer", "time_embedder/linear_2"),
        *(linear(f"{p}.lin", p) for p in MODULATIONS.split("|")),
        linear("final_layer.linear", "proj_out"),
        linear("final_layer.adaLN_modulation.1", "norm_out", LINEAR_SWAPPED),
    ]
    streams = {
        "img": ("to_q|to_k|to_v", "to_out", "norm_", "ff"),
        "txt": ("add_q_proj|add_k_proj|add_v_proj", "to_add_out", "norm_added_", "ff_context"),
    }
    blocks = "double_blocks", config.num_layers
    for stream, (qkv, out, norm, ff) in streams.items():
        rules += [
            layers(*blocks, f"{stream}_attn.qkv.weight#{{part}}", f"{DOUBLE}/attn/{{part}}",
                   part=qkv),
            layers(*blocks, f"{stream}_attn.proj.weight", f"{DOUBLE}/attn/{out}"),
            layers(*blocks, f"{stream}_mlp.0.weight", f"{DOUBLE}/{ff}/linear_in"),
            layers(*blocks, f"{stream}_mlp.2.weight", f"{DOUBLE}/{ff}/linear_out"),
            *_bfl_norms(layers, blocks, f"{stream}_attn.norm", f"{DOUBLE}/attn/{norm}"),
        ]
    blocks = "single_blocks", config.num_single_layers
    return [
        *rules,
        layers(*blocks, "linear1.weight", f"{SINGLE}/attn/to_qkv_mlp_proj"),
        layers(*blocks, "linear2.weight", f"{SINGLE}/attn/to_out"),
        *_bfl_norms(layers, blocks, "norm", f"{SINGLE}/attn/norm_"),
    ]


def _bfl_norms(layers, blocks: tuple[str, int], tensor: str, target: str) -> list[Rule]:
    """Norms of q and k; files of some tools say `weight` where the makers say `scale`."""
    return [
        layers(*blocks, f"{tensor}.{long}_norm.{{kind}}", f"{target}{short}", "scale",
               kind="scale|weight")
        for long, short in (("query", "q"), ("key", "k"))
    ]
