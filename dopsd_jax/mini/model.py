"""Command: the mini model's sizes, tokenizer and blank weights, as a pipeline directory.

    python -m dopsd_jax.mini.model --data runs/mini/world --out runs/mini/blank

Every file is as in Z-Image-Turbo and Qwen3-VL-4B-Instruct, only numbers are smaller. The training
stages open the directory with the loader that real models use, and write the same files again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tokenizers import pre_tokenizers, trainers

from dopsd_jax.core import cli, trees
from dopsd_jax.models.qwen3_vl import Qwen3VLConfig
from dopsd_jax.weights import random_pipeline, random_tokenizer
from dopsd_jax.weights.families import transformer_table
from dopsd_jax.weights.pipeline import load_pipeline, read_json
from dopsd_jax.weights.qwen3_names import qwen3_table, vision_table
from dopsd_jax.weights.random_pipeline import Sizes
from dopsd_jax.weights.save import replace_tensors
from dopsd_jax.weights.vae_names import vae_table

FLAGS = flags.FLAGS
PIPELINE, VLM = "pipeline", "qwen3_vl"
VOCABULARY = 1024  # with the special tokens
LATENT_CHANNELS = 16  # as Z-Image's


def sizes(merges: Sequence[tuple[str, str]]) -> Sizes:
    """About 10 M parameters in all, of which 5.7 M are the transformer's.

    Patches of 2, because diffusers' pipeline knows no other; so the VAE halves the sides only
    twice, and a picture of 64 pixels has 64 tokens.
    """
    return Sizes(
        transformer=random_pipeline.TRANSFORMER | {
            "all_patch_size": [2], "axes_dims": [16, 24, 24], "axes_lens": [1536, 128, 128],
            "cap_feat_dim": 128, "dim": 192, "in_channels": LATENT_CHANNELS, "n_heads": 3,
            "n_kv_heads": 3, "n_layers": 7, "n_refiner_layers": 1,
        },
        vae=random_pipeline.VAE | {
            "block_out_channels": [16, 32, 96], "latent_channels": LATENT_CHANNELS,
            "down_block_types": ["DownEncoderBlock2D"] * 3, "layers_per_block": 1,
            "norm_num_groups": 8, "sample_size": 64, "scaling_factor": 1.0, "shift_factor": 0.0,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
        language=random_pipeline.LANGUAGE | {
            "head_dim": 32, "hidden_size": 128, "intermediate_size": 384,
            "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
        },
        vision=random_pipeline.VISION | {
            "deepstack_visual_indexes": [1], "depth": 4, "hidden_size": 128,
            "intermediate_size": 384, "num_heads": 4, "num_position_embeddings": 64,
            "out_hidden_size": 128, "patch_size": 8,
        },
        mrope_section=(6, 5, 5), vlm_rope_theta=1000000,
        preprocessor=random_pipeline.PREPROCESSOR | {
            "patch_size": 8, "size": {"longest_edge": 64 * 64, "shortest_edge": 64 * 64},
        },
        merges=tuple(merges),
    )


def train_merges(captions: Sequence[str]) -> list[tuple[str, str]]:
    """The byte-pair merges that make the world's words, and the template's, single tokens."""
    tokenizer = random_tokenizer.tokenizer(())
    special = len(random_tokenizer.SPECIAL_TOKENS) + len(random_tokenizer.THINK_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - special, show_progress=False, special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    template = ["user", "assistant"] * (len(captions) // 2)
    tokenizer.train_from_iterator([*captions, *template], trainer)
    return [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]


def fresh(shapes: trees.Tree, rng: jax.Array) -> trees.Tree:
    """Random float32 parameters fit for training, for any of the networks.

    Kernels keep variance; what ends a residual branch or modulates starts small, and the gates of
    a transformer block start at 0.3.
    """
    small = ("adaLN_modulation/kernel", "final_modulation/kernel", "final_linear/kernel")

    def draw(number: int, name: str, x) -> np.ndarray:
        last = name.rsplit("/", 1)[-1]
        if last in ("scale", "bias"):
            value = np.full(x.shape, float(last == "scale"), np.float32)
            if name.endswith("adaLN_modulation/bias"):  # scale, gate, scale, gate
                value.reshape(*x.shape[:-1], 4, -1)[..., 1::2, :] = 0.3
            return value
        value = np.asarray(jax.random.normal(jax.random.fold_in(rng, number), x.shape, jnp.float32))
        if last == "kernel":
            inputs = np.prod(x.shape[-4:-1]) if "conv" in name or x.ndim == 4 else x.shape[-2]
            value = value / np.sqrt(inputs)
        else:
            value = value * (0.5 if "embed_tokens" in name else 0.02)
        return value * 0.1 if name.endswith(small) else value

    flat = trees.flatten(shapes)
    return trees.unflatten({n: draw(i, n, x) for i, (n, x) in enumerate(flat.items())})


def save_models(
    pipeline: str | Path, vlm: str | Path, out: str | Path, parts: dict[str, trees.Tree], *,
    vae_scale: dict[str, float] | None = None, dtype=None,
) -> None:
    """Writes `out`/pipeline and `out`/qwen3_vl: copies with some parts replaced.

    Args:
        pipeline, vlm: The directories to start from.
        out: Parent of the two; what stands there is replaced.
        parts: Parameters by name: transformer, vae, text_encoder (also the VLM's language model),
            vision.
        vae_scale: shift_factor and scaling_factor of the VAE, if they change.
        dtype: Of all tensors; None keeps that of the files.
    """
    out = Path(out)
    partial = Path(tempfile.mkdtemp(prefix=".models-", dir=out))
    try:
        new_pipeline, new_vlm = partial / PIPELINE, partial / VLM
        shutil.copytree(pipeline, new_pipeline)
        shutil.copytree(vlm, new_vlm)
        pipe = load_pipeline(pipeline, dtype="float32", parts=())
        text = pipe.text_encoder
        vision = Qwen3VLConfig.from_json(read_json(new_vlm / "config.json")).vision
        tables = {
            "transformer": (new_pipeline / "transformer", transformer_table(pipe.denoiser)),
            "vae": (new_pipeline / "vae", vae_table(pipe.vae.config)),
            "text_encoder": (new_pipeline / "text_encoder", qwen3_table(text.config, text.depth)),
            "vision": (new_vlm, vision_table(vision)),
        }
        for part, tree in parts.items():
            replace_tensors(*tables[part], tree, dtype)
        if vae_scale:
            file = new_pipeline / "vae" / "config.json"
            file.write_text(json.dumps(read_json(file) | vae_scale, indent=2) + "\n")
        for path in (new_pipeline, new_vlm):
            target = out / path.name
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_blank(data: str | Path, out: str | Path) -> tuple[Path, Path]:
    """Writes `out`/pipeline and `out`/qwen3_vl with random weights, for the words of a world."""
    captions: list[str] = []
    for part in ("scenes", "pairs"):
        captions += json.loads((Path(data) / part / "captions.json").read_text())
    return random_pipeline.write_random_pipeline(
        out, sizes=sizes(train_merges(captions)), names=(PIPELINE, VLM),
    )


def main() -> None:
    print(*write_blank(FLAGS.data, FLAGS.out), sep="\n")


if __name__ == "__main__":
    flags.DEFINE_string("data", "runs/mini/world", "From dopsd_jax.mini.build.")
    flags.DEFINE_string("out", "runs/mini/blank", "Parent of the two directories.")
    cli.run_command(main)
