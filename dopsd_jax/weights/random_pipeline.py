"""Writes a tiny Z-Image pipeline and a tiny Qwen3-VL with random weights, in their file formats.

For tests and for trying the commands without a download: every file, config key and tensor name is
as in Tongyi-MAI/Z-Image-Turbo and Qwen/Qwen3-VL-4B-Instruct, so what opens those opens these. The
pictures mean nothing.

    python -m dopsd_jax.weights.random_pipeline --out DIR [--seed 0]

Source: diffusers 0.42.1 and transformers 5.23 (configs, names and shapes).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel

PIPELINE = "z_image_tiny"
VLM = "qwen3_vl_tiny"
DIFFUSERS_VERSION = "0.42.1"

Shapes = dict[str, tuple[int, ...]]

# In the order of their ids, which follow the byte and merge tokens. The last two are ordinary text
# to a decoder that skips special tokens, as in Qwen3.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
THINK_TOKENS = ("<think>", "</think>")
# The last one must never apply: digits are single words.
MERGES = (
    ("Ġ", "a"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("in", "g"), ("1", "2"),
)
# Words, single digits, runs of punctuation, line ends, spaces: how Qwen2 cuts text before merging.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

VL_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif part.type == 'text' %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TRANSFORMER = {
    "_class_name": "ZImageTransformer2DModel", "_diffusers_version": DIFFUSERS_VERSION,
    "all_f_patch_size": [1], "all_patch_size": [2], "axes_dims": [4, 6, 6],
    "axes_lens": [1536, 128, 128],  # room for 1024 teacher tokens
    "cap_feat_dim": 32, "dim": 64, "in_channels": 4, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2,
    "n_refiner_layers": 2, "norm_eps": 1e-05, "qk_norm": True, "rope_theta": 256.0,
    "siglip_feat_dim": None, "t_scale": 1000.0,
}

VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": DIFFUSERS_VERSION, "act_fn": "silu",
    "block_out_channels": [8, 16, 24, 24], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True, "in_channels": 3, "latent_channels": 4, "latents_mean": None,
    "latents_std": None, "layers_per_block": 2, "mid_block_add_attention": True,
    "norm_num_groups": 4, "out_channels": 3, "sample_size": 64, "scaling_factor": 0.3611,
    "shift_factor": 0.1159, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False, "use_quant_conv": False,
}

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": DIFFUSERS_VERSION,
    "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False,
}

MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

# What the text encoder and the language model of the VLM share; the query width is not the width.
LANGUAGE = {
    "attention_bias": False, "attention_dropout": 0.0, "head_dim": 16, "hidden_act": "silu",
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 96, "num_attention_heads": 4,
    "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True, "use_cache": True,
    "vocab_size": 320,  # more rows than tokens, as in Qwen3
}

VISION = {
    "deepstack_visual_indexes": [0, 2], "depth": 3, "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 32, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 64,
    "model_type": "qwen3_vl", "num_heads": 2, "num_position_embeddings": 36, "out_hidden_size": 32,
    "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
}

PREPROCESSOR = {
    "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "Qwen2VLImageProcessorFast",
    "image_std": [0.5, 0.5, 0.5], "merge_size": 2, "patch_size": 16,
    "processor_class": "Qwen3VLProcessor",
    "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "temporal_patch_size": 2,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers of a pipeline and its VLM; everything else is as published.

    Attributes:
        transformer, vae: Their config.json.
        language: What the text encoder and the VLM's language model share.
        vision: vision_config of the VLM.
        mrope_section: Of the VLM; sums to half the head's dim.
        vlm_rope_theta: RoPE base of the VLM's language model; the text encoder's is 1e6.
        preprocessor: preprocessor_config.json of the VLM.
        merges: Byte-pair merges of the tokenizer.
    """

    transformer: dict
    vae: dict
    language: dict
    vision: dict
    mrope_section: tuple[int, ...]
    vlm_rope_theta: float
    preprocessor: dict
    merges: tuple[tuple[str, str], ...]


TINY = Sizes(
    TRANSFORMER, VAE, LANGUAGE, VISION, mrope_section=(4, 2, 2), vlm_rope_theta=5000000,
    preprocessor=PREPROCESSOR, merges=MERGES,
)


def language_config(sizes: Sizes, ids: dict[str, int], dtype: str) -> dict:
    """text_encoder/config.json, in the spelling of the published file (transformers 4)."""
    return {
        **sizes.language,
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": dtype,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "max_position_embeddings": 40960, "max_window_layers": sizes.language["num_hidden_layers"],
        "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "use_sliding_window": False, "transformers_version": "4.51.0",
    }


def vlm_config(sizes: Sizes, ids: dict[str, int], dtype: str) -> dict:
    """config.json of the VLM; its language model has a RoPE base of its own."""
    section = list(sizes.mrope_section)
    rope = {"mrope_interleaved": True, "mrope_section": section, "rope_type": "default"}
    text = {
        **sizes.language,
        "model_type": "qwen3_vl_text", "dtype": dtype,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "max_position_embeddings": 262144, "rope_scaling": rope, "rope_theta": sizes.vlm_rope_theta,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
        "text_config": text, "vision_config": sizes.vision,
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True, "transformers_version": "4.57.0.dev0",
    }


def _affine(name: str, *weight: int) -> Shapes:
    """A layer with weight and bias; the bias is as long as the weight's leading axis."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def transformer_shapes(c: dict) -> Shapes:
    """Tensor names and shapes of a Z-Image transformer with config `c`."""
    dim, cond, mlp = c["dim"], min(c["dim"], 256), int(c["dim"] / 3 * 8)
    (patch,), (frames,) = c["all_patch_size"], c["all_f_patch_size"]
    patch_dim, key = patch**2 * frames * c["in_channels"], f"{patch}-{frames}"
    shapes = {
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
        **_affine(f"all_x_embedder.{key}", dim, patch_dim),
        **_affine(f"all_final_layer.{key}.linear", patch_dim, dim),
        **_affine(f"all_final_layer.{key}.adaLN_modulation.1", dim, cond),
        **_affine("t_embedder.mlp.0", 1024, 256),
        **_affine("t_embedder.mlp.2", cond, 1024),
        "cap_embedder.0.weight": (c["cap_feat_dim"],),
        **_affine("cap_embedder.1", dim, c["cap_feat_dim"]),
    }
    refiners = c["n_refiner_layers"]
    stacks = {"noise_refiner": refiners, "context_refiner": refiners, "layers": c["n_layers"]}
    for stack, depth in stacks.items():
        for block in (f"{stack}.{i}" for i in range(depth)):
            for p in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes[f"{block}.attention.{p}.weight"] = (dim, dim)
            for p in ("norm_q", "norm_k"):
                shapes[f"{block}.attention.{p}.weight"] = (dim // c["n_heads"],)
            for p, shape in {"w1": (mlp, dim), "w2": (dim, mlp), "w3": (mlp, dim)}.items():
                shapes[f"{block}.feed_forward.{p}.weight"] = shape
            for p in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                shapes[f"{block}.{p}.weight"] = (dim,)
            if stack != "context_refiner":
                shapes |= _affine(f"{block}.adaLN_modulation.0", 4 * dim, cond)
    return shapes


def _resnet(name: str, cin: int, cout: int) -> Shapes:
    shapes = {
        **_affine(f"{name}.norm1", cin),
        **_affine(f"{name}.conv1", cout, cin, 3, 3),
        **_affine(f"{name}.norm2", cout),
        **_affine(f"{name}.conv2", cout, cout, 3, 3),
    }
    return shapes if cin == cout else shapes | _affine(f"{name}.conv_shortcut", cout, cin, 1, 1)


def _mid_block(name: str, c: int) -> Shapes:
    shapes = _affine(f"{name}.attentions.0.group_norm", c)
    for p in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes |= _affine(f"{name}.attentions.0.{p}", c, c)
    return shapes | _resnet(f"{name}.resnets.0", c, c) | _resnet(f"{name}.resnets.1", c, c)


def _half_vae(half: str, blocks: str, resample: str, widths: list[int], resnets: int) -> Shapes:
    """The blocks of the encoder or the decoder; every block but the last resamples at its end."""
    shapes, cin = {}, widths[0]
    for i, cout in enumerate(widths):
        name = f"{half}.{blocks}.{i}"
        for j in range(resnets):
            shapes |= _resnet(f"{name}.resnets.{j}", cin if j == 0 else cout, cout)
        if i < len(widths) - 1:
            shapes |= _affine(f"{name}.{resample}.0.conv", cout, cout, 3, 3)
        cin = cout
    return shapes


def vae_shapes(c: dict) -> Shapes:
    """Tensor names and shapes of an AutoencoderKL with config `c`, without quant convolutions."""
    widths, latent, n = c["block_out_channels"], c["latent_channels"], c["layers_per_block"]
    return {
        **_affine("encoder.conv_in", widths[0], c["in_channels"], 3, 3),
        **_half_vae("encoder", "down_blocks", "downsamplers", widths, n),
        **_mid_block("encoder.mid_block", widths[-1]),
        **_affine("encoder.conv_norm_out", widths[-1]),
        **_affine("encoder.conv_out", 2 * latent, widths[-1], 3, 3),
        **_affine("decoder.conv_in", widths[-1], latent, 3, 3),
        **_half_vae("decoder", "up_blocks", "upsamplers", widths[::-1], n + 1),
        **_mid_block("decoder.mid_block", widths[-1]),
        **_affine("decoder.conv_norm_out", widths[0]),
        **_affine("decoder.conv_out", c["out_channels"], widths[0], 3, 3),
    }


def language_shapes(c: dict, prefix: str) -> Shapes:
    """Tensor names and shapes of a Qwen3Model with config `c`; the tied head is no tensor."""
    width, mlp, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    layer = {
        "self_attn.q_proj": (q, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, q),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    return {
        f"{prefix}embed_tokens.weight": (c["vocab_size"], width),
        **{
            f"{prefix}layers.{i}.{p}.weight": shape
            for i in range(c["num_hidden_layers"])
            for p, shape in layer.items()
        },
        f"{prefix}norm.weight": (width,),
    }


def vision_shapes(c: dict, prefix: str) -> Shapes:
    """Tensor names and shapes of the Qwen3-VL vision tower with vision_config `c`."""
    width, mlp, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    merged = width * c["spatial_merge_size"] ** 2
    kernel = (c["in_channels"], c["temporal_patch_size"], patch, patch)
    shapes = {
        **_affine("patch_embed.proj", width, *kernel),
        "pos_embed.weight": (c["num_position_embeddings"], width),
    }
    for block in (f"blocks.{i}" for i in range(c["depth"])):
        shapes |= _affine(f"{block}.norm1", width) | _affine(f"{block}.norm2", width)
        shapes |= _affine(f"{block}.attn.qkv", 3 * width, width)
        shapes |= _affine(f"{block}.attn.proj", width, width)
        shapes |= _affine(f"{block}.mlp.linear_fc1", mlp, width)
        shapes |= _affine(f"{block}.mlp.linear_fc2", width, mlp)
    mergers = [f"deepstack_merger_list.{k}" for k in range(len(c["deepstack_visual_indexes"]))]
    for merger in ["merger", *mergers]:
        # The main merger normalises before it groups four patches, the others after.
        shapes |= _affine(f"{merger}.norm", width if merger == "merger" else merged)
        shapes |= _affine(f"{merger}.linear_fc1", merged, merged)
        shapes |= _affine(f"{merger}.linear_fc2", c["out_hidden_size"], merged)
    return {prefix + name: shape for name, shape in shapes.items()}


def draw(shapes: Shapes, dtype: np.dtype, *stream: int) -> dict[str, np.ndarray]:
    """Random values that keep activations of order one and leave nothing zero or trivial.

    Args:
        shapes: Tensor names and shapes.
        dtype: Of the result; the same float32 draw is rounded for every dtype.
        *stream: Seed and number of the component: components do not share random numbers.
    """
    rng = np.random.default_rng(stream)
    tensors = {}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape, np.float32)
        if name.endswith(".bias"):
            value *= 0.1
        elif name.endswith(".weight") and len(shape) == 1:
            value = 1 + 0.1 * value
        elif not name.endswith(("embed_tokens.weight", "pos_embed.weight", "_pad_token")):
            value /= math.sqrt(math.prod(shape[1:]))
        tensors[name] = np.ascontiguousarray(value, dtype)
    return tensors


def tokenizer(merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Byte-level BPE like Qwen2's: 256 bytes, some merges, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(a + b for a, b in merges)]
    result = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=list(merges)))
    result.normalizer = normalizers.NFC()
    result.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    result.post_processor = ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([_added(t, True) for t in SPECIAL_TOKENS])
    result.add_tokens([_added(t, False) for t in THINK_TOKENS])
    return result


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _tokenizer_config(ids: dict[str, int]) -> dict:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(ids[t]): {"content": t, **plain, "special": t in SPECIAL_TOKENS}
            for t in (*SPECIAL_TOKENS, *THINK_TOKENS)
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(directory: Path, merges, **config) -> dict[str, int]:
    """Writes tokenizer.json, vocab.json, merges.txt and the config; returns the special ids."""
    directory.mkdir(parents=True, exist_ok=True)
    made = tokenizer(merges)
    made.save(str(directory / "tokenizer.json"))
    made.model.save(str(directory))
    ids = {t: made.token_to_id(t) for t in (*SPECIAL_TOKENS, *THINK_TOKENS)}
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(ids) | config)
    return ids


def _halves(tensors: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    total, done, first = sum(t.nbytes for t in tensors.values()), 0, {}
    for name, tensor in tensors.items():
        if done >= total / 2:
            break
        first[name] = tensor
        done += tensor.nbytes
    yield first
    yield {n: t for n, t in tensors.items() if n not in first}


def _write_tensors(directory: Path, stem: str, tensors: dict, *, sharded: bool = False) -> None:
    """One file, or two with an index as the large checkpoints have."""
    directory.mkdir(parents=True, exist_ok=True)
    if not sharded:
        save_file(tensors, directory / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, part in enumerate(_halves(tensors)):
        file = f"{stem}-{i + 1:05}-of-00002.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / f"{stem}.safetensors.index.json", index)


def _numpy_dtype(dtype: str) -> np.dtype:
    if dtype == "bfloat16":
        import ml_dtypes  # NumPy knows bfloat16 only through it

        return np.dtype(ml_dtypes.bfloat16)
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype!r}")
    return np.dtype(dtype)


def _write_pipeline(out: Path, sizes: Sizes, seed: int, dtype: str, prefix: str) -> None:
    kind = _numpy_dtype(dtype)
    _write_json(out / "model_index.json", MODEL_INDEX)
    _write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    ids = _write_tokenizer(out / "tokenizer", sizes.merges, chat_template=TEXT_TEMPLATE)
    config = language_config(sizes, ids, dtype)
    _write_json(out / "text_encoder" / "config.json", config)
    _write_json(out / "transformer" / "config.json", sizes.transformer)
    _write_json(out / "vae" / "config.json", sizes.vae)
    stem = "diffusion_pytorch_model"
    transformer = draw(transformer_shapes(sizes.transformer), kind, seed, 0)
    _write_tensors(out / "transformer", stem, transformer, sharded=True)
    _write_tensors(out / "vae", stem, draw(vae_shapes(sizes.vae), kind, seed, 1))
    language = draw(language_shapes(config, prefix), kind, seed, 2)
    _write_tensors(out / "text_encoder", "model", language)


def _write_vlm(out: Path, sizes: Sizes, seed: int, dtype: str) -> None:
    kind = _numpy_dtype(dtype)
    ids = _write_tokenizer(out, sizes.merges, processor_class="Qwen3VLProcessor")
    config = vlm_config(sizes, ids, dtype)
    _write_json(out / "config.json", config)
    _write_json(out / "preprocessor_config.json", sizes.preprocessor)
    video = sizes.preprocessor | {"video_processor_type": "Qwen3VLVideoProcessor"}
    del video["image_processor_type"]
    _write_json(out / "video_preprocessor_config.json", video)
    (out / "chat_template.jinja").write_text(VL_TEMPLATE, encoding="utf-8")
    language = draw(
        language_shapes(config["text_config"], "model.language_model."), kind, seed, 3
    )
    vision = draw(vision_shapes(sizes.vision, "model.visual."), kind, seed, 4)
    _write_tensors(out, "model", language | vision)


def write_random_pipeline(
    out: str | Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    text_encoder_prefix: str = "model.",
    sizes: Sizes = TINY,
    names: tuple[str, str] = (PIPELINE, VLM),
) -> tuple[Path, Path]:
    """Writes `out`/z_image_tiny and `out`/qwen3_vl_tiny; the same seed gives the same bytes.

    The language weights of the two differ, and so do their RoPE bases, as in the real pair.

    Args:
        out: Parent directory, made if absent. Neither of the two may stand in it yet.
        seed: Of all weights.
        dtype: Of all weights: float32, bfloat16 or float16.
        text_encoder_prefix: Before every tensor name of the text encoder. The published files were
            saved from a Qwen3ForCausalLM and carry "model."; a pipeline saved again by diffusers
            has "".
        sizes: Numbers of the networks, and the tokenizer's merges.
        names: Of the two directories.

    Returns:
        The pipeline directory and the VLM directory.

    Raises:
        ValueError: An unknown dtype.
        FileExistsError: One of the two directories exists; nothing is written then.
    """
    out = Path(out)
    _numpy_dtype(dtype)
    targets = tuple(out / name for name in names)
    present = [str(t) for t in targets if t.exists()]
    if present:
        raise FileExistsError(f"{', '.join(present)}: exists already; remove it or choose another")
    out.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: an interrupted run leaves no half-written model under the final name.
    partial = Path(tempfile.mkdtemp(prefix=".random_pipeline-", dir=out))
    try:
        _write_pipeline(partial / names[0], sizes, seed, dtype, text_encoder_prefix)
        _write_vlm(partial / names[1], sizes, seed, dtype)
        for target in targets:
            (partial / target.name).rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return targets


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="parent of the two directories")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args(argv)
    for path in write_random_pipeline(args.out, seed=args.seed, dtype=args.dtype):
        print(path)


if __name__ == "__main__":
    main()
