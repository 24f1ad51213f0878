"""Classifier-free guidance beside diffusers' pipelines: same pixels from the same noise."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline
from PIL import Image

from dopsd_jax import sample, weights
from dopsd_jax.method import guidance as guidance_lib
from dopsd_jax.run import model
from tests.test_flux2_parity import REFERENCES, noise_of

PROMPTS = ["a red fox", "a quiet harbour town with boats"]
SIZE = dict(num_steps=3, height=64, width=32)
NEGATIVE = "blurry, " * 20  # longer than the prompts: all of them are padded further


def undistilled(pipeline, directory, file, **values):
    """A copy of a pipeline whose files say that it is not distilled."""
    shutil.copytree(pipeline, directory)
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


@pytest.fixture(scope="module")
def z_image(tiny, tmp_path_factory):
    return undistilled(tiny.pipeline, tmp_path_factory.mktemp("guided") / "base",
                       "scheduler/scheduler_config.json", shift=6.0)


@pytest.fixture(scope="module")
def flux2(tiny_flux2, tmp_path_factory):
    return undistilled(tiny_flux2, tmp_path_factory.mktemp("guided") / "base",
                       "model_index.json", is_distilled=False)


def open_both(kind, directory):
    other = kind.from_pretrained(directory, torch_dtype=torch.float32)
    other.set_progress_bar_config(disable=True)
    return weights.load_pipeline(directory, dtype="float32"), other


def check_pixels(got, want, plain):
    assert want.std() > 0.04 and np.abs(want - plain).mean() > 0.01  # guidance does something
    off = np.abs(got.astype(np.float64) - np.round(want * 255))
    print(f"mean {off.mean():.4f}/255, max {off.max():.0f}/255")
    assert off.mean() <= 0.02 and off.max() <= 2


def test_the_first_familys_pictures_are_those_of_its_pipeline(z_image):
    ours, other = open_both(ZImagePipeline, z_image)
    shape = (2, *ours.denoiser.latent_shape(SIZE["height"], SIZE["width"]))
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def theirs(**kwargs):
        return other(
            prompt=list(PROMPTS), height=64, width=32, num_inference_steps=3,
            latents=torch.from_numpy(noise).permute(0, 3, 1, 2), output_type="np", **kwargs,
        ).images

    plain = theirs(guidance_scale=0.0)
    for negative in ("", NEGATIVE):
        given = {"negative_prompt": [negative] * 2} if negative else {}
        got = sample.generate(
            ours, PROMPTS, **SIZE, noise=noise, guidance=2.5, negative=negative
        )
        check_pixels(got, theirs(guidance_scale=2.5, **given), plain)


def test_the_other_familys_pictures_are_those_of_its_pipeline(flux2):
    """With references, which both halves see."""
    ours, other = open_both(Flux2KleinPipeline, flux2)
    noise = noise_of(64, 32)

    def theirs(**kwargs):
        return other(
            prompt=list(PROMPTS), image=REFERENCES, height=64, width=32, num_inference_steps=3,
            latents=torch.from_numpy(noise).permute(0, 3, 1, 2), output_type="np", **kwargs,
        ).images

    plain = theirs(guidance_scale=1.0)
    for negative in ("", NEGATIVE):
        given = {"negative_prompt_embeds": other.encode_prompt([negative] * 2)[0]}
        got = sample.generate(ours, PROMPTS, **SIZE, noise=noise, references=[REFERENCES] * 2,
                              guidance=2.5, negative=negative)
        check_pixels(got, theirs(guidance_scale=2.5, **(given if negative else {})), plain)


def test_what_does_not_go_together_is_said_once_in_plain_words(tiny, tiny_flux2, z_image, flux2,
                                                               caplog):
    guidance_lib._advise.cache_clear()
    for directory, scale, said in (
        (tiny.pipeline, 4, "guidance is built into its weights"), (tiny.pipeline, 0, ""),
        (z_image, 0, "it is made for guidance"), (z_image, 4, ""),
        (tiny_flux2, 4, "guidance is built into its weights"),
        (flux2, 0, "it is made for guidance"), (flux2, 4, ""),
    ):
        caplog.clear()
        pipe = weights.load_pipeline(directory, parts=())
        for _ in range(2):
            guidance_lib.advise(pipe, scale)
        assert [said in r.message for r in caplog.records] == [True] * bool(said)


@pytest.mark.parametrize("family,kwargs,message", [
    ("z_image", dict(guidance=-1), "guidance: expected 0 for none or a number above 0, .* got -1"),
    ("z_image", dict(guidance=float("nan")), "got nan"), ("z_image", dict(guidance="4"), "got '4'"),
    ("flux2", dict(guidance=1), "expected 0 for none or a number above 1, as .* got 1"),
    ("z_image", dict(negative="blurry"), "negative: expected none with guidance = 0, got 'blurry'"),
    ("z_image", dict(negative="x " * 600, guidance=4), "negative: prompt 0 .* at most 512 tokens"),
    ("z_image", dict(negative=3, guidance=4), "negative: prompt 0 is no text"),
])
def test_bad_input_is_named(request, family, kwargs, message):
    pipe = weights.load_pipeline(request.getfixturevalue(family), parts=())
    with pytest.raises(ValueError, match=message):
        sample.check_request(pipe, ["a"], **SIZE, **kwargs)


class Given(SimpleNamespace):
    """Flags of a command."""

    def __getitem__(self, name):
        return SimpleNamespace(value=getattr(self, name))


def test_the_command_draws_with_guidance_and_notes_it(z_image, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "FLAGS", Given(
        model=str(z_image), **dict.fromkeys(model.FILES, ""), lora=None, prompt=PROMPTS, **SIZE,
        reference=None, seed=3, dtype="float32", out=str(tmp_path), guidance=2.5,
        negative=NEGATIVE, base_dtype="dtype", encoder_dtype="dtype",
        cache_quantised=False,
    ))
    sample.main()
    pipe = weights.load_pipeline(z_image, dtype="float32")
    want = sample.generate(pipe, PROMPTS, **SIZE, seed=3, guidance=2.5, negative=NEGATIVE)
    for file, picture in zip(sorted(tmp_path.glob("*.json")), want, strict=True):
        made = json.loads(file.read_text())
        assert made["guidance"] == 2.5 and made["negative"] == NEGATIVE
        np.testing.assert_array_equal(Image.open(file.with_suffix(".png")), picture)
