"""Writes a tiny Z-Image pipeline and a tiny Qwen3-VL with random weights, in their file formats.

For tests and for trying the commands without a download: every file, config key and tensor name is
as in Tongyi-MAI/Z-Image-Turbo and Qwen/Qwen3-VL-4B-Instruct, so what opens those opens these. The
pictures mean nothing.

    python -m dopsd_jax.weights.random_pipeline --out DIR [--seed 0]

Source: diffusers 0.42.1 and transformers 5.23 (configs, names and shapes).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dopsd_jax.weights.random_shapes import (
    Shapes,
    affine,
    language_shapes,
    vae_shapes,
    vision_shapes,
)
from dopsd_jax.weights.random_tokenizer import (
    MERGES,
    SPECIAL_TOKENS,
    TEXT_TEMPLATE,
    THINK_TOKENS,
    VL_TEMPLATE,
    tokenizer,
    tokenizer_config,
)

PIPELINE = "z_image_tiny"
VLM = "qwen3_vl_tiny"
DIFFUSERS_VERSION = "0.42.1"

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


def transformer_shapes(c: dict) -> Shapes:
    """Tensor names and shapes of a Z-Image transformer with config `c`."""
    dim, cond, mlp = c["dim"], min(c["dim"], 256), int(c["dim"] / 3 * 8)
    (patch,), (frames,) = c["all_patch_size"], c["all_f_patch_size"]
    patch_dim, key = patch**2 * frames * c["in_channels"], f"{patch}-{frames}"
    shapes = {
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
        **affine(f"all_x_embedder.{key}", dim, patch_dim),
        **affine(f"all_final_layer.{key}.linear", patch_dim, dim),
        **affine(f"all_final_layer.{key}.adaLN_modulation.1", dim, cond),
        **affine("t_embedder.mlp.0", 1024, 256),
        **affine("t_embedder.mlp.2", cond, 1024),
        "cap_embedder.0.weight": (c["cap_feat_dim"],),
        **affine("cap_embedder.1", dim, c["cap_feat_dim"]),
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
                shapes |= affine(f"{block}.adaLN_modulation.0", 4 * dim, cond)
    return shapes


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
        elif name.endswith((".weight", ".running_var")) and len(shape) == 1:
            value = 1 + 0.1 * value
        elif not name.endswith(("embed_tokens.weight", "pos_embed.weight", "_pad_token",
                                "running_mean")):
            value /= math.sqrt(math.prod(shape[1:]))
        tensors[name] = np.ascontiguousarray(value, dtype)
    return tensors


def write_json(path: Path, values: dict) -> None:
    """Writes a JSON object, indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(directory: Path, merges, **config) -> dict[str, int]:
    """Writes tokenizer.json, vocab.json, merges.txt and the config; returns the special ids."""
    directory.mkdir(parents=True, exist_ok=True)
    made = tokenizer(merges)
    made.save(str(directory / "tokenizer.json"))
    made.model.save(str(directory))
    ids = {t: made.token_to_id(t) for t in (*SPECIAL_TOKENS, *THINK_TOKENS)}
    write_json(directory / "tokenizer_config.json", tokenizer_config(ids) | config)
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


def write_tensors(directory: Path, stem: str, tensors: dict, *, sharded: bool = False) -> None:
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
    write_json(directory / f"{stem}.safetensors.index.json", index)


def numpy_dtype(dtype: str) -> np.dtype:
    """The dtype of that name, bfloat16 included."""
    if dtype == "bfloat16":
        import ml_dtypes  # NumPy knows bfloat16 only through it

        return np.dtype(ml_dtypes.bfloat16)
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype!r}")
    return np.dtype(dtype)


def _write_pipeline(out: Path, sizes: Sizes, seed: int, dtype: str, prefix: str) -> None:
    kind = numpy_dtype(dtype)
    write_json(out / "model_index.json", MODEL_INDEX)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    ids = write_tokenizer(out / "tokenizer", sizes.merges, chat_template=TEXT_TEMPLATE)
    config = language_config(sizes, ids, dtype)
    write_json(out / "text_encoder" / "config.json", config)
    write_json(out / "transformer" / "config.json", sizes.transformer)
    write_json(out / "vae" / "config.json", sizes.vae)
    stem = "diffusion_pytorch_model"
    transformer = draw(transformer_shapes(sizes.transformer), kind, seed, 0)
    write_tensors(out / "transformer", stem, transformer, sharded=True)
    write_tensors(out / "vae", stem, draw(vae_shapes(sizes.vae), kind, seed, 1))
    language = draw(language_shapes(config, prefix), kind, seed, 2)
    write_tensors(out / "text_encoder", "model", language)


def _write_vlm(out: Path, sizes: Sizes, seed: int, dtype: str) -> None:
    kind = numpy_dtype(dtype)
    ids = write_tokenizer(out, sizes.merges, processor_class="Qwen3VLProcessor")
    config = vlm_config(sizes, ids, dtype)
    write_json(out / "config.json", config)
    write_json(out / "preprocessor_config.json", sizes.preprocessor)
    video = sizes.preprocessor | {"video_processor_type": "Qwen3VLVideoProcessor"}
    del video["image_processor_type"]
    write_json(out / "video_preprocessor_config.json", video)
    (out / "chat_template.jinja").write_text(VL_TEMPLATE, encoding="utf-8")
    language = draw(
        language_shapes(config["text_config"], "model.language_model."), kind, seed, 3
    )
    vision = draw(vision_shapes(sizes.vision, "model.visual."), kind, seed, 4)
    write_tensors(out, "model", language | vision)


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
    numpy_dtype(dtype)
    targets = tuple(out / name for name in names)
    with complete_or_nothing(out, targets) as partial:
        _write_pipeline(partial / names[0], sizes, seed, dtype, text_encoder_prefix)
        _write_vlm(partial / names[1], sizes, seed, dtype)
    return targets


@contextlib.contextmanager
def complete_or_nothing(out: Path, targets: Sequence[Path]) -> Iterator[Path]:
    """A folder in `out` to write in; at the end its contents become `targets`, if nothing failed.

    An interrupted run leaves no half-written model under the final name.

    Raises:
        FileExistsError: A target exists; nothing is written then.
    """
    present = [str(t) for t in targets if t.exists()]
    if present:
        raise FileExistsError(f"{', '.join(present)}: exists already; remove it or choose another")
    out.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".random_pipeline-", dir=out))
    try:
        yield partial
        for target in targets:
            (partial / target.name).rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
