"""The whole recipe on very small networks, run once for all tests of the mini model."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image, ImageDraw

from dopsd_jax.mini import build, make, model
from dopsd_jax.mini.emoji import CONCEPTS, SETS, SPRITE


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    sprites = {}
    for i, name in enumerate(SETS):
        for j, concept in enumerate(CONCEPTS):
            image = Image.new("RGBA", (SPRITE, SPRITE))
            fill = ((40 * i) % 256, (20 * j) % 256, (90 * j) % 256, 255)
            ImageDraw.Draw(image).rectangle((10, 10, 118, 60 + j), fill=fill)
            sprites[name, concept] = np.asarray(image)
    out = tmp_path_factory.mktemp("mini") / "world"
    for kind in ("scenes", "pairs", "judge", "judge_test"):
        build.build(sprites, out, kind, 130, seed=0)
    return out


def small(sizes):
    """The same kinds of networks, as small as they go."""
    return dataclasses.replace(
        sizes,
        transformer=sizes.transformer | {"dim": 48, "axes_dims": [4, 6, 6], "n_layers": 1,
                                         "cap_feat_dim": 32},
        vae=sizes.vae | {"block_out_channels": [8, 8, 8]},
        language=sizes.language | {"hidden_size": 32, "head_dim": 16, "intermediate_size": 32,
                                   "num_hidden_layers": 3},
        vision=sizes.vision | {"hidden_size": 32, "intermediate_size": 32, "depth": 2,
                               "out_hidden_size": 32, "num_heads": 2},
        mrope_section=(4, 2, 2),
    )


@pytest.fixture(scope="session")
def recipe(world, tmp_path_factory):
    """All stages, two updates each; the directory that holds a folder for each.

    It takes minutes, nearly all of them compiling: only one file should ask for it.
    """
    out, sizes = tmp_path_factory.mktemp("recipe"), model.sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "sizes", lambda merges: small(sizes(merges)))
        make.train(out, world, "tiny", 0, updates=2)
    return out


@pytest.fixture(scope="session")
def in_diffusers():
    """(pipeline directory, prompts, noise, lora=None) -> diffusers' pictures, [B, H, W, 3]."""
    def draw(directory, prompts, noise, lora=None):
        other = ZImagePipeline.from_pretrained(directory, torch_dtype=torch.float32)
        other.set_progress_bar_config(disable=True)
        if lora is not None:
            other.load_lora_weights(str(lora))
        images = other(
            prompt=list(prompts), height=64, width=64, num_inference_steps=2, guidance_scale=0.0,
            latents=torch.from_numpy(np.array(noise)).permute(0, 3, 1, 2), output_type="np",
        ).images
        return np.round(images * 255)

    return draw
