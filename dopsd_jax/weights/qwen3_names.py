"""Tensor names of Qwen3 and of Qwen3-VL's vision tower in transformers' layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dopsd_jax.models.qwen3 import Qwen3Config
from dopsd_jax.models.qwen3_vl import VisionConfig
from dopsd_jax.weights.load import PREFIXES, open_tensors
from dopsd_jax.weights.names import LINEAR, SAME, Rule, Transform, WeightsError, rule

# `Qwen3ForCausalLM` puts "model." before every name of `Qwen3Model`.
PREFIX = r"(?:model\.)?"
LANGUAGE = "model.language_model."


def _one_of(numbers: Iterable[int]) -> str:
    return "|".join(map(str, numbers))


def qwen3_table(config: Qwen3Config, depth: int) -> list[Rule]:
    """The name table of the first `depth` layers; deeper ones, final norm and head are unused."""
    layer = {"prefix": PREFIX, "layer": _one_of(range(depth))}
    table = [
        rule("{prefix}embed_tokens.weight", "embed_tokens", prefix=PREFIX),
        rule("{prefix}layers.{layer}.self_attn.{p}.weight", "layers/self_attn/{p}/kernel", LINEAR,
             p="q_proj|k_proj|v_proj|o_proj", **layer),
        rule("{prefix}layers.{layer}.self_attn.{p}.weight", "layers/self_attn/{p}/scale",
             p="q_norm|k_norm", **layer),
        rule("{prefix}layers.{layer}.mlp.{p}.weight", "layers/mlp/{p}/kernel", LINEAR,
             p="gate_proj|up_proj|down_proj", **layer),
        rule("{prefix}layers.{layer}.{p}.weight", "layers/{p}/scale",
             p="input_layernorm|post_attention_layernorm", **layer),
        rule("{prefix}norm.weight", None, prefix=PREFIX),
        rule("lm_head.weight", None),
    ]
    if depth < config.num_layers:
        deeper = _one_of(range(depth, config.num_layers))
        table.append(rule("{prefix}layers.{i}.{rest}", None, prefix=PREFIX, i=deeper, rest=".+"))
    return table


def vision_table(config: VisionConfig) -> list[Rule]:
    """The name table of the vision tower inside a whole Qwen3-VL checkpoint.

    The language model of the checkpoint is unused: the pipeline's text encoder stands in for it
    (see `check_language_match`).
    """
    size = config.patch_size
    patch = Transform(  # a convolution whose stride is its kernel is a Dense
        lambda x: x.reshape(x.shape[0], -1).T,
        lambda x: x.T.reshape(
            x.shape[1], config.in_channels, config.temporal_patch_size, size, size
        ),
    )

    def named(template: str, target: str | None, transform: Transform = SAME, **groups) -> Rule:
        return rule("{prefix}visual." + template, target, transform, prefix=PREFIX, **groups)

    def dense(tensor: str, target: str, transform: Transform = LINEAR, **groups) -> list[Rule]:
        return [
            named(f"{tensor}.weight", f"{target}/kernel", transform, **groups),
            named(f"{tensor}.bias", f"{target}/bias", **groups),
        ]

    def norm(tensor: str, target: str, **groups) -> list[Rule]:
        return [
            named(f"{tensor}.weight", f"{target}/scale", **groups),
            named(f"{tensor}.bias", f"{target}/bias", **groups),
        ]

    both = {"p": "linear_fc1|linear_fc2"}
    return [
        *dense("patch_embed.proj", "patch_embed", patch),
        named("pos_embed.weight", "pos_embed"),
        *norm("blocks.{layer}.{p}", "blocks/{p}", p="norm1|norm2"),
        *dense("blocks.{layer}.attn.{p}", "blocks/{p}", p="qkv|proj"),
        *dense("blocks.{layer}.mlp.{p}", "blocks/{p}", **both),
        *norm("merger.norm", "merger/norm"),
        *dense("merger.{p}", "merger/{p}", **both),
        *norm("deepstack_merger_list.{layer}.norm", "deepstack_mergers/norm"),
        *dense("deepstack_merger_list.{layer}.{p}", "deepstack_mergers/{p}", **both),
        rule("model.language_model.{rest}", None, rest=".+"),
        # Checkpoints whose tower is called `visual.` call the language model plainly `model.`.
        rule("model.{p}.{rest}", None, p="embed_tokens|layers|norm", rest=".+"),
        rule("lm_head.weight", None),
    ]


def check_language_match(
    vl_files: Iterable[str | Path], text_files: Iterable[str | Path]
) -> int:
    """Checks that a text encoder can stand in for the language model of a Qwen3-VL checkpoint.

    Args:
        vl_files: Safetensors files of the Qwen3-VL checkpoint.
        text_files: Safetensors files of the pipeline's text encoder.

    Returns:
        How many tensors match by name and shape; all of them.

    Raises:
        WeightsError: Every tensor of either side that the other lacks or holds in another shape.

    Source: D-OPSD, z-image-turbo_self-distill-vlm, copies what matches into the VLM.
        Differs from reference: there, tensors that do not match keep Qwen3-VL's weights silently;
        of a `Qwen3ForCausalLM`, whose names begin with "model.", none matched.
    """
    vl = {
        name.removeprefix(LANGUAGE): shape
        for name, shape in _shapes(vl_files).items()
        if name.startswith(LANGUAGE)
    }
    text = {
        name.removeprefix("model."): shape
        for name, shape in _shapes(text_files).items()
        if name != "lm_head.weight"
    }
    problems = []
    if not vl:
        problems.append(f"no tensor of the Qwen3-VL files is called {LANGUAGE}*")
    for name in sorted(vl.keys() | text.keys()):
        if vl.get(name) != text.get(name):
            problems.append(
                f"{name}: {vl.get(name, 'missing')} in Qwen3-VL, "
                f"{text.get(name, 'missing')} in the text encoder"
            )
    if problems:
        raise WeightsError(
            f"The text encoder does not fit in the place of Qwen3-VL's language model "
            f"({len(vl)} and {len(text)} tensors, {len(problems)} problems); use the Qwen3-VL of "
            "the text encoder's size:\n  " + "\n  ".join(problems)
        )
    return len(vl)


def _shapes(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    tensors = open_tensors(files, PREFIXES["text_encoder"])
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
