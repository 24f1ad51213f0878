"""The shipped mini model: whole, small, the same in diffusers, and fit for a run."""

import numpy as np
import pytest

from dopsd_jax import sample, weights
from dopsd_jax.core import trees
from dopsd_jax.export import export
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.method import sampling
from dopsd_jax.mini.before_after import before_and_after
from dopsd_jax.run import loras
from dopsd_jax.weights.pipeline import load_vision_language
from dopsd_jax.weights.shipped import ASSETS, PIPELINES, UNDISTILLED
from tests.notebook import executed

PROMPTS = ["a red umbrella and a small cat, noto style", "a star, neon style"]


@pytest.fixture(scope="module")
def pipe():
    return weights.load_pipeline("mini", dtype="float32", remat="none")


@pytest.fixture(scope="module")
def noise(pipe):
    return sampling.draw_noise([3, 4], pipe.denoiser.latent_shape(64, 64))


@pytest.fixture(scope="module")
def notebook_and_run(tmp_path_factory):
    """docs/quickstart.ipynb, executed, and its workdir: two updates of configs/mini_style.py."""
    workdir = tmp_path_factory.mktemp("style") / "run"
    return executed(workdir, updates=2), workdir


@pytest.fixture(scope="module")
def run(notebook_and_run):
    """The workdir of two updates of configs/mini_style.py."""
    return notebook_and_run[1]


def test_it_is_small_and_whole(pipe):
    vl = load_vision_language("mini", pipe, dtype="float32")
    count = sum(map(trees.count, (pipe.params, pipe.text_params, pipe.vae_params, vl.params)))
    assert 8e6 < count < 12e6
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 60e6


def test_diffusers_opens_it_and_draws_the_same_picture(pipe, noise, in_diffusers):
    want = in_diffusers(PIPELINES["mini"], PROMPTS, noise)
    got = sample.generate(pipe, PROMPTS, num_steps=2, noise=noise)
    off = np.abs(got - want)
    assert want.std() > 10
    assert off.mean() <= 1 and off.max() <= 4


def test_words_of_the_prompt_show_in_the_picture(pipe):
    dark, light = (
        sample.generate(pipe, [f"a {thing}, {style} style" for thing in ("cat", "car", "key")],
                        num_steps=2, seed=5).mean((1, 2, 3))
        for style in ("night", "ink")
    )
    assert dark.max() < 100 and light.min() > 150


def test_the_undoing_lora_makes_another_model_of_it(pipe, noise):
    tree, scale = loras.read_lora(UNDISTILLED, pipe)
    assert lora_lib.num_linears(tree) > 50
    few = sample.generate(pipe, PROMPTS, num_steps=2, noise=noise)
    undone = sample.generate(pipe, PROMPTS, num_steps=2, noise=noise, lora=(tree, scale))
    assert np.abs(few.astype(float) - undone).mean() > 3


def test_the_notebook_runs_from_the_first_cell_to_the_last(notebook_and_run):
    notebook, run = notebook_and_run
    for name in ("checkpoints/2", "samples/step_000002.png", "lora.safetensors", "report.html",
                 "drawn/0000-a-cat-blueprint-style.png"):
        assert (run / name).exists(), name
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 8 + 4 + 2
    assert not [o for o in outputs if o.output_type == "error"]


def test_a_lora_trained_on_it_draws_the_same_in_diffusers(
    pipe, noise, run, in_diffusers, tmp_path
):
    file = tmp_path / "lora.safetensors"
    export(str(run), "diffusers", str(file))
    got = sample.generate(pipe, PROMPTS, num_steps=2, noise=noise, lora=run)
    plain = sample.generate(pipe, PROMPTS, num_steps=2, noise=noise)
    assert np.any(got != plain)
    off = np.abs(got - in_diffusers(PIPELINES["mini"], PROMPTS, noise, file))
    assert off.mean() <= 1 and off.max() <= 4


def test_the_quickstart_draws_base_tuned_and_teacher_on_the_same_noise(run):
    new, old = before_and_after(run, "mini", "mini")
    rows, side = 8, 2 * 64 + 4
    assert new.shape == (16 + rows * side + 4, 4 * side + 4, 3)
    assert old.shape == (16 + 6 * side + 4, 2 * side + 4, 3)
    cells = new[16:-4].reshape(rows, side, -1, 3)[:, 4:, 4:].reshape(rows, 128, 4, side, 3)
    real, base, tuned, teacher = np.moveaxis(cells[:, :, :, :128], 2, 0)
    assert real.std() > 10
    # After two updates the tuned pictures are almost the base's; the teacher saw a picture.
    assert np.abs(base.astype(int) - tuned).mean() < np.abs(base.astype(int) - teacher).mean()
