"""`encode` with random encoders of Z-Image-Turbo's published sizes: what host memory it takes.

    pytest -m slow tests/full_size/test_encode_full_size.py -s

Qwen3-4B and the vision tower of Qwen3-VL-4B, 17.5 GB of files with the language weights twice, as
the published ones have them. Needs 18 GB of disk and 14 GB of free memory.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from skimage import data as photographs

from dopsd_jax.data.cache import Cache
from dopsd_jax.weights import random_pipeline, random_shapes

ROOT = Path(__file__).parents[2]
LANGUAGE = random_pipeline.LANGUAGE | {
    "head_dim": 128, "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "vocab_size": 151936,
}
VISION = random_pipeline.VISION | {
    "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_size": 1024,
    "intermediate_size": 4096, "num_heads": 16, "num_position_embeddings": 2304,
    "out_hidden_size": 2560,
}
VAE = random_pipeline.VAE | {
    "block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "norm_num_groups": 32,
    "sample_size": 1024,
}
SIZES = dataclasses.replace(
    random_pipeline.TINY, vae=VAE, language=LANGUAGE, vision=VISION, mrope_section=(24, 20, 20),
    transformer=random_pipeline.TRANSFORMER | {"cap_feat_dim": 2560, "in_channels": 16},
)
BYTES = 2 * (4_022_468_096 + 415_347_712)  # language model and vision tower, bfloat16
SHARD_BYTES = 10**9
ROWS = 2


def write_in_shards(directory, shapes):
    """Random bfloat16 weights, a shard at a time, with an index."""
    parts, size = [{}], 0
    for name, shape in shapes.items():
        size += 2 * int(np.prod(shape))
        if size > SHARD_BYTES and parts[-1]:
            parts.append({})
            size = 2 * int(np.prod(shape))
        parts[-1][name] = shape
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        tensors = random_pipeline.draw(part, random_pipeline.numpy_dtype("bfloat16"), i)
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The two directories; the large networks are written as they are drawn."""
    monkeypatch.setattr(random_pipeline, "language_shapes", lambda *_: {})
    monkeypatch.setattr(random_pipeline, "vision_shapes", lambda *_: {})
    pipeline, vlm = random_pipeline.write_random_pipeline(tmp_path, dtype="bfloat16", sizes=SIZES)
    for directory in (pipeline / "text_encoder", vlm):
        (directory / "model.safetensors").unlink()
    write_in_shards(pipeline / "text_encoder", random_shapes.language_shapes(LANGUAGE, "model."))
    write_in_shards(vlm, random_shapes.language_shapes(LANGUAGE, "model.language_model.")
                    | random_shapes.vision_shapes(VISION, "model.visual."))
    yield pipeline, vlm
    for directory in (pipeline, vlm):
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.slow
def test_encode_takes_the_encoders_and_little_more(model, tmp_path):
    pipeline, vlm = model
    photos, cache = tmp_path / "photos", tmp_path / "cache"
    photos.mkdir()
    for name in ("astronaut", "chelsea")[:ROWS]:
        Image.fromarray(getattr(photographs, name)()).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(f"a photograph of {name}\n")
    done = subprocess.run(
        [sys.executable, "-m", "dopsd_jax.encode", "--config", "configs/z_image_turbo_lora.py",
         f"--config.model={pipeline}", f"--config.vlm={vlm}", f"--config.data={photos}",
         f"--config.cache={cache}", "--config.buckets=512x512", "--config.batch_size=2",
         "--config.sample_prompts=()", "--config.gauge_prompts=()"],
        cwd=ROOT, text=True, capture_output=True, check=False,
        env=dict(
            os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu",
            # As in full_size.py: without it XLA on CPU holds all layers in float32, 16 GB.
            XLA_FLAGS="--xla_disable_hlo_passes=while-loop-invariant-code-motion",
        ),
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    (peak,) = re.findall(r"written; host memory so far at most ([\d.]+) GB", done.stderr)
    made = Cache(str(cache))
    assert len(made) == 2 * ROWS
    assert all(np.isfinite(made[key]).all() for key in made)
    assert BYTES < float(peak) * 1e9 < 1.25 * BYTES
