"""What the recipe makes is a Z-Image pipeline: diffusers opens it, and a LoRA tuned on it."""

import numpy as np
import pytest

from configs import mini_style
from dopsd_jax import sample, train, weights
from dopsd_jax.export import export
from dopsd_jax.mini import model
from dopsd_jax.mini.before_after import before_and_after

PROMPTS = ["a red umbrella and a small cat, noto style", "a bell, neon style"]


@pytest.fixture(scope="module")
def pipe(recipe):
    return weights.load_pipeline(recipe / "turbo" / model.PIPELINE, dtype="float32", remat="none")


@pytest.fixture(scope="module")
def noise(pipe):
    return sample.draw_noise([3, 4], pipe.denoiser.latent_shape(64, 64))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """The workdir of two updates of configs/mini_style.py."""
    workdir = tmp_path_factory.mktemp("style") / "run"
    c = mini_style.get_config()
    c.model, c.vlm = (str(recipe / "turbo" / name) for name in (model.PIPELINE, model.VLM))
    c.num_train_steps, c.sample_every, c.checkpoint_every, c.warmup_steps = 2, 2, 2, 0
    c.learning_rate = 0.02
    train.train(c, workdir)
    return workdir


def test_diffusers_draws_the_same_picture(pipe, noise, in_diffusers):
    want = in_diffusers(pipe.directory, PROMPTS, noise)
    got = sample.generate(pipe, PROMPTS, num_steps=2, noise=noise)
    off = np.abs(got - want)
    assert want.std() > 5
    assert off.mean() <= 1 and off.max() <= 4


def test_a_lora_trained_on_it_draws_the_same_in_diffusers(
    pipe, noise, run, in_diffusers, tmp_path
):
    file = tmp_path / "lora.safetensors"
    export(str(run), "diffusers", str(file))
    got = sample.generate(pipe, PROMPTS, num_steps=2, noise=noise, lora=run)
    plain = sample.generate(pipe, PROMPTS, num_steps=2, noise=noise)
    assert np.abs(got.astype(int) - plain).mean() > 0.1
    off = np.abs(got - in_diffusers(pipe.directory, PROMPTS, noise, file))
    assert off.mean() <= 1 and off.max() <= 4


def test_before_and_after_shows_base_tuned_and_teacher(recipe, run):
    new, old = before_and_after(
        run, *(recipe / "turbo" / name for name in (model.PIPELINE, model.VLM))
    )
    rows, side = 8, 2 * 64 + 4
    assert new.shape == (16 + rows * side + 4, 4 * side + 4, 3)
    assert old.shape == (16 + 6 * side + 4, 2 * side + 4, 3)
    row = new[16 : 16 + 128]
    real, base, tuned, _ = (row[:, 4 + i * side :][:, :128].astype(int) for i in range(4))
    assert real.std() > 10 and np.any(base != tuned)
