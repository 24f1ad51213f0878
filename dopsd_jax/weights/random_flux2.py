"""Writes a tiny FLUX.2-klein pipeline with random weights, in the published file formats.

As weights/random_pipeline.py, for the other family.

    python -m dopsd_jax.weights.random_flux2 --out DIR [--seed 0]

Source: diffusers 0.42.1 and transformers 5.23 (configs, names and shapes).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from dopsd_jax.weights.random_pipeline import (
    DIFFUSERS_VERSION,
    TINY,
    VAE,
    complete_or_nothing,
    draw,
    language_config,
    numpy_dtype,
    write_json,
    write_tensors,
    write_tokenizer,
)
from dopsd_jax.weights.random_shapes import (
    Shapes,
    affine,
    language_shapes,
    vae_shapes,
)
from dopsd_jax.weights.random_tokenizer import TEXT_TEMPLATE

PIPELINE = "flux2_klein_tiny"

TRANSFORMER = {
    "_class_name": "Flux2Transformer2DModel", "_diffusers_version": DIFFUSERS_VERSION,
    "attention_head_dim": 16, "axes_dims_rope": [4, 4, 4, 4], "eps": 1e-06,
    "guidance_embeds": False, "in_channels": 16, "joint_attention_dim": 96, "mlp_ratio": 3.0,
    "num_attention_heads": 3, "num_layers": 2, "num_single_layers": 3, "out_channels": None,
    "patch_size": 1, "rope_theta": 2000, "timestep_guidance_channels": 256,
}

FLUX2_VAE = {
    **{k: v for k, v in VAE.items() if not k.startswith(("latents_", "scaling_", "shift_"))},
    "_class_name": "AutoencoderKLFlux2", "batch_norm_eps": 0.0001, "batch_norm_momentum": 0.1,
    "decoder_block_out_channels": None, "patch_size": [2, 2], "use_post_quant_conv": True,
    "use_quant_conv": True,
}

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": DIFFUSERS_VERSION,
    "base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False,
    "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "shift_terminal": None, "stochastic_sampling": False, "time_shift_type": "exponential",
    "use_beta_sigmas": False, "use_dynamic_shifting": True, "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}

MODEL_INDEX = {
    "_class_name": "Flux2KleinPipeline", "_diffusers_version": DIFFUSERS_VERSION,
    "is_distilled": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}

LAYERS = 28  # of the text encoder: the features are taken after 9, 18 and 27


def flux2_transformer_shapes(c: dict) -> Shapes:
    """Tensor names and shapes of a FLUX.2 transformer with config `c`; it has no biases."""
    head = c["attention_head_dim"]
    dim = head * c["num_attention_heads"]
    mlp = int(dim * c["mlp_ratio"])
    shapes = {
        "x_embedder": (dim, c["in_channels"]),
        "context_embedder": (dim, c["joint_attention_dim"]),
        "time_guidance_embed.timestep_embedder.linear_1": (dim, c["timestep_guidance_channels"]),
        "time_guidance_embed.timestep_embedder.linear_2": (dim, dim),
        "double_stream_modulation_img.linear": (6 * dim, dim),
        "double_stream_modulation_txt.linear": (6 * dim, dim),
        "single_stream_modulation.linear": (3 * dim, dim),
        "norm_out.linear": (2 * dim, dim),
        "proj_out": (c["in_channels"], dim),
    }
    for block in (f"transformer_blocks.{i}" for i in range(c["num_layers"])):
        for p in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                  "to_add_out"):
            shapes[f"{block}.attn.{p}"] = (dim, dim)
        for p in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{block}.attn.{p}"] = (head,)
        for ff in ("ff", "ff_context"):
            shapes[f"{block}.{ff}.linear_in"] = (2 * mlp, dim)
            shapes[f"{block}.{ff}.linear_out"] = (dim, mlp)
    for block in (f"single_transformer_blocks.{i}" for i in range(c["num_single_layers"])):
        shapes[f"{block}.attn.to_qkv_mlp_proj"] = (3 * dim + 2 * mlp, dim)
        shapes[f"{block}.attn.to_out"] = (dim, dim + mlp)
        for p in ("norm_q", "norm_k"):
            shapes[f"{block}.attn.{p}"] = (head,)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def flux2_vae_shapes(c: dict) -> Shapes:
    """Tensor names and shapes of an AutoencoderKLFlux2 with config `c`, but for the step count."""
    latent = c["latent_channels"]
    return {
        **vae_shapes(c),
        **affine("quant_conv", 2 * latent, 2 * latent, 1, 1),
        **affine("post_quant_conv", latent, latent, 1, 1),
        "bn.running_mean": (4 * latent,),
        "bn.running_var": (4 * latent,),
    }


def write_random_flux2(
    out: str | Path, *, seed: int = 0, dtype: str = "float32", name: str = PIPELINE
) -> Path:
    """Writes `out`/flux2_klein_tiny; the same seed gives the same bytes.

    Args:
        out: Parent directory, made if absent.
        seed: Of all weights.
        dtype: Of all weights: float32, bfloat16 or float16.
        name: Of the directory.

    Returns:
        The directory.

    Raises:
        ValueError: An unknown dtype.
        FileExistsError: The directory exists; nothing is written then.
    """
    target = Path(out) / name
    numpy_dtype(dtype)
    with complete_or_nothing(Path(out), [target]) as partial:
        _write(partial / name, seed, dtype)
    return target


def _write(out: Path, seed: int, dtype: str) -> None:
    kind = numpy_dtype(dtype)
    write_json(out / "model_index.json", MODEL_INDEX)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    ids = write_tokenizer(out / "tokenizer", TINY.merges, chat_template=TEXT_TEMPLATE)
    config = language_config(TINY, ids, dtype) | {
        "num_hidden_layers": LAYERS, "max_window_layers": LAYERS,
    }
    write_json(out / "text_encoder" / "config.json", config)
    write_json(out / "transformer" / "config.json", TRANSFORMER)
    write_json(out / "vae" / "config.json", FLUX2_VAE)
    stem = "diffusion_pytorch_model"
    transformer = draw(flux2_transformer_shapes(TRANSFORMER), kind, seed, 10)
    for name, tensor in transformer.items():
        if ".attn.norm_" in name:  # sharp attention: else 512 text tokens drown a few others
            tensor *= kind.type(2)
    write_tensors(out / "transformer", stem, transformer)
    vae = draw(flux2_vae_shapes(FLUX2_VAE), kind, seed, 11)
    vae["bn.num_batches_tracked"] = np.array(1000, np.int64)
    write_tensors(out / "vae", stem, vae)
    language = draw(language_shapes(config, "model."), kind, seed, 12)
    write_tensors(out / "text_encoder", "model", language, sharded=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="parent of the directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args(argv)
    print(write_random_flux2(args.out, seed=args.seed, dtype=args.dtype))


if __name__ == "__main__":
    main()
