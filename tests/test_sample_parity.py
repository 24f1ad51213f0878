"""`sample.generate` beside diffusers' ZImagePipeline: same pixels from the same noise."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from dopsd_jax import sample, weights
from dopsd_jax.core import trees
from dopsd_jax.models.z_image import ZImageConfig
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.shapes import transformer_shapes
from dopsd_jax.weights.z_image import Z_IMAGE

Z_IMAGE_MODULES = Z_IMAGE.modules(ZImageConfig())

PROMPTS = ["a red fox", "a long description of a quiet harbour town, with boats and gulls, at dawn"]
HEIGHT, WIDTH = 96, 64


@pytest.fixture(scope="module")
def torch_pipe(tiny):
    pipe = ZImagePipeline.from_pretrained(tiny.pipeline, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny):
    return weights.load_pipeline(tiny.pipeline, dtype="float32")


@pytest.fixture(scope="module")
def noise():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, HEIGHT // 8, WIDTH // 8, 4)).astype(np.float32)


def draw_torch(torch_pipe, noise, num_steps):
    images = torch_pipe(
        prompt=list(PROMPTS), height=HEIGHT, width=WIDTH, num_inference_steps=num_steps,
        guidance_scale=0.0, latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
        output_type="np",
    ).images
    return np.round(images * 255)


def difference(got, want):
    return np.abs(got.astype(np.float64) - want)


@pytest.mark.parametrize("num_steps", [4, 8])
def test_equals_diffusers_pixel_for_pixel(pipe, torch_pipe, noise, num_steps):
    want = draw_torch(torch_pipe, noise, num_steps)
    got = sample.generate(
        pipe, PROMPTS, num_steps=num_steps, height=HEIGHT, width=WIDTH, noise=noise
    )
    assert want.std() > 10  # a flat picture would agree with anything
    off = difference(got, want)
    print(f"{num_steps} calls: mean {off.mean():.4f}/255, max {off.max():.0f}/255")
    assert off.mean() <= 1 and off.max() <= 4


@pytest.mark.parametrize("fmt", ["peft", "diffusers", "comfyui"])
def test_exported_lora_draws_the_same_picture_elsewhere(pipe, noise, tmp_path, fmt, tiny):
    rng = np.random.default_rng(1)
    shapes = trees.flatten(transformer_shapes(pipe.denoiser.network))
    flat = {}
    for name, x in shapes.items():
        if name.endswith("/kernel") and ("/attention/" in name or "/feed_forward/" in name):
            path = name.removesuffix("/kernel")
            *stack, fan_in, fan_out = x.shape
            flat[f"{path}/a"] = rng.standard_normal((*stack, fan_in, 4)).astype(np.float32) / 4
            flat[f"{path}/b"] = rng.standard_normal((*stack, 4, fan_out)).astype(np.float32) / 10
    lora = trees.unflatten(flat)
    spec = lora_files.LoraSpec(4, 8.0)
    path = tmp_path / ("lora" if fmt == "peft" else "lora.safetensors")
    lora_files.FORMATS[fmt](path, lora, spec, Z_IMAGE_MODULES)

    size = dict(num_steps=4, height=HEIGHT, width=WIDTH, noise=noise)
    ours = sample.generate(pipe, PROMPTS, **size, lora=(lora, 2.0))
    base = sample.generate(pipe, PROMPTS, **size)
    assert difference(ours, base).mean() > 2
    again = sample.generate(pipe, PROMPTS, **size, lora=path)
    assert difference(again, ours).max() <= 1

    other = ZImagePipeline.from_pretrained(tiny.pipeline, torch_dtype=torch.float32)
    other.set_progress_bar_config(disable=True)
    if fmt == "peft":
        from peft import PeftModel

        other.transformer = PeftModel.from_pretrained(other.transformer, path).merge_and_unload()
    else:
        other.load_lora_weights(path)
    off = difference(ours, draw_torch(other, noise, 4))
    assert off.mean() <= 1 and off.max() <= 4


@pytest.fixture(scope="module")
def narrow(tiny, tmp_path_factory):
    """(positions) -> the same weights in a checkpoint with so many positions for the text."""
    def open_with(positions):
        directory = tmp_path_factory.mktemp("narrow") / "pipeline"
        shutil.copytree(tiny.pipeline, directory)
        file = directory / "transformer" / "config.json"
        config = json.loads(file.read_text())
        config["axes_lens"][0] = positions
        file.write_text(json.dumps(config))
        return weights.load_pipeline(directory, dtype="float32")

    return open_with


def test_a_checkpoint_needs_positions_for_the_lengths_that_are_used_alone(pipe, narrow, noise):
    few = narrow(512)
    size = dict(num_steps=2, height=HEIGHT, width=WIDTH, noise=noise)
    ours = sample.generate(few, PROMPTS, **size)
    assert ours.std() > 10
    np.testing.assert_array_equal(ours, sample.generate(pipe, PROMPTS, **size))
    long = "a long red fox " * 28
    sample.check_request(pipe, [long], num_steps=2, height=HEIGHT, width=WIDTH)
    with pytest.raises(ValueError, match="at most 256 tokens, template included, got .*shorten"):
        sample.check_request(few, [long], num_steps=2, height=HEIGHT, width=WIDTH)
    with pytest.raises(ValueError, match="length 64 needs 66 positions, the checkpoint has 65"):
        sample.generate(narrow(65), PROMPTS, **size)


def test_a_picture_depends_on_its_own_seed_alone(pipe):
    size = dict(num_steps=1, height=32, width=32)
    both = sample.generate(pipe, ["a", "a"], seed=5, **size)
    one = sample.generate(pipe, ["a"], seed=6, **size)
    assert difference(both[1:], one).max() <= 1
    assert difference(both[0], both[1]).max() > 4


@pytest.mark.parametrize(
    "kwargs,message",
    [(dict(height=40), "multiples of 16, got 40x32"),
     (dict(num_steps=0), "at least 1 denoiser call"),
     (dict(num_steps=1001), "expected at most 1000 denoiser calls, got 1001"),
     (dict(num_steps=2.0), "num_steps: expected a whole number of denoiser calls, got 2.0"),
     (dict(height=64.0), "height: expected a whole number of pixels, got 64.0"),
     (dict(seed=2**40), r"seed: expected a whole number in \[0, 2\^31\], got 1099511627776"),
     (dict(seed=-5), "seed: .* got -5"), (dict(seed=1.5), "seed: .* got 1.5"),
     (dict(noise=np.zeros((1, 4, 4, 3), np.float32)),
      r"^noise: expected \[1 4 4 4\], got \[1 4 4 3\]$"),
     (dict(noise=[1, 2]), r"^noise: expected \[1 4 4 4\], got \[2\]$"),
     (dict(noise="fox"), "noise: expected an array of numbers, got 'fox'"),
     (dict(noise=np.full((1, 4, 4, 4), np.nan)), "noise: holds NaN or infinity"),
     (dict(lora=5), r"lora: expected a path, \(path, strength\) or \(tree, .*, got 5"),
     (dict(lora=({}, 1)), "lora: expected a tree of pairs of arrays a and b, .* got {}"),
     (dict(lora=({"layers": {"a": 3, "b": 4}}, 1)), "lora: expected a tree of pairs of arrays"),
     (dict(lora=({}, "x")), "lora: expected a path, "), (dict(prompts=[None]), "is no text"),
     (dict(lora=({"x": {"a": np.zeros((3, 1)), "b": np.zeros((1, 3))}}, 1)),
      "lora: the LoRA belongs to another model"), (dict(prompts=5), "non-empty list"),
     (dict(prompts=[]), "non-empty list"), (dict(prompts="fox"), "got 'fox'"),
     (dict(prompts=[" "]), "empty"), (dict(lora="nowhere.safetensors"), "nowhere.safetensors"),
     (dict(prompts=["x " * 600]), "at most 512 tokens")],
)
def test_bad_input_is_named(pipe, kwargs, message):
    arguments = dict(prompts=["a"], num_steps=1, height=32, width=32) | kwargs
    with pytest.raises(ValueError, match=message):
        sample.generate(pipe, arguments.pop("prompts"), **arguments)


def test_pictures_that_are_not_finite_are_refused_by_prompt(pipe):
    noise = np.random.default_rng(0).standard_normal((3, 4, 4, 4)).astype(np.float32)
    noise[1] = 3e38
    with pytest.raises(ValueError, match=r"^1 of 3 pictures hold NaN or .* of the prompts \[1\] "):
        sample.generate(pipe, ["a", "b", "c"], num_steps=1, height=32, width=32, noise=noise)
