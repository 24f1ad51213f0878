"""Several LoRAs add up: beside weights merged in float32, beside diffusers, and through files."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from dopsd_jax import export as export_lib
from dopsd_jax import sample, weights
from dopsd_jax.core import trees
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.models.denoiser import Context
from dopsd_jax.run import loras
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.pipeline import load_pipeline, load_transformer
from dopsd_jax.weights.shapes import transformer_shapes
from tests.commands import ROOT, environment

SIZE = dict(num_steps=2, height=32, width=32)
STRENGTHS = (1.0, 0.7)


@pytest.fixture(scope="module")
def pipe(tiny):
    return weights.load_pipeline(tiny.pipeline, dtype="float32")


def random_lora(pipe, where, rank, seed):
    """A LoRA on the linears whose names contain `where`."""
    rng, flat = np.random.default_rng(seed), {}
    for name, x in trees.flatten(transformer_shapes(pipe.denoiser.network)).items():
        if name.endswith("/kernel") and where in name and len(x.shape) == 3:
            path = name.removesuffix("/kernel")
            *stack, fan_in, fan_out = x.shape
            flat[f"{path}/a"] = rng.standard_normal((*stack, fan_in, rank), np.float32) / 4
            flat[f"{path}/b"] = rng.standard_normal((*stack, rank, fan_out), np.float32) / 10
    return trees.unflatten(flat)


@pytest.fixture(scope="module")
def two(pipe, tmp_path_factory):
    """Two LoRA files, of other ranks, alphas and linears, some of which both adapt."""
    folder = tmp_path_factory.mktemp("loras")
    files = []
    for i, (where, rank, alpha) in enumerate((("/attention/", 4, 8.0), ("/", 3, 2.0))):
        file = folder / f"{i}.safetensors"
        lora_files.save_diffusers(
            file, random_lora(pipe, where, rank, i), lora_files.LoraSpec(rank, alpha),
            pipe.lora.modules,
        )
        files.append(str(file))
    return files


def merged_by_hand(pipe, files):
    """The transformer's weights with both in them, in float64."""
    flat = {n: np.asarray(x, np.float64) for n, x in trees.flatten(pipe.params).items()}
    for file, strength in zip(files, STRENGTHS, strict=True):
        tree, scale = loras.read_lora(file, pipe)
        pairs = trees.flatten(tree)
        for name in (n for n in pairs if n.endswith("/a")):
            path = name.removesuffix("/a")
            delta = pairs[name].astype(np.float64) @ pairs[f"{path}/b"].astype(np.float64)
            flat[f"{path}/kernel"] += strength * scale * delta
    return trees.unflatten({n: x.astype(np.float32) for n, x in flat.items()})


def velocity(pipe, variables):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 8, 4, pipe.denoiser.latent_shape(32, 32)[2])).astype(np.float32)
    text = rng.standard_normal((2, 64, pipe.denoiser.text_width)).astype(np.float32)
    ctx = Context(text, np.arange(64)[None] < np.array([[40], [64]]))
    return np.asarray(pipe.denoiser.velocity(variables, x, np.float32([0.3, 0.9]), ctx))


def test_ranks_side_by_side_are_the_weights_merged(pipe, two):
    members = list(zip(two, STRENGTHS, strict=True))
    tree = loras.take_loras(members, pipe)
    ranks = {x.shape[-1] for n, x in trees.flatten(tree).items() if n.endswith("/a")}
    assert ranks == {3, 7}
    got = velocity(pipe, {"params": pipe.params, "lora": tree})
    want = velocity(pipe, {"params": merged_by_hand(pipe, two)})
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-5
    alone = velocity(pipe, {"params": pipe.params, "lora": loras.take_loras(members[:1], pipe)})
    assert np.abs(got - alone).max() / np.abs(want).max() > 0.05


def test_the_pictures_are_those_of_diffusers_with_both_set(pipe, two, tiny):
    noise = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    other = ZImagePipeline.from_pretrained(tiny.pipeline, torch_dtype=torch.float32)
    other.set_progress_bar_config(disable=True)
    for name, file in zip("ab", two, strict=True):
        other.load_lora_weights(file, adapter_name=name)
    other.set_adapters(["a", "b"], list(STRENGTHS))
    want = other(
        prompt=["a red fox"], height=32, width=32, num_inference_steps=2, guidance_scale=0.0,
        latents=torch.from_numpy(noise).permute(0, 3, 1, 2), output_type="np",
    ).images * 255
    got = sample.generate(
        pipe, ["a red fox"], **SIZE, noise=noise, lora=list(zip(two, STRENGTHS, strict=True))
    )
    plain = sample.generate(pipe, ["a red fox"], **SIZE, noise=noise)
    assert np.abs(got - np.round(want)).max() <= 1
    assert np.abs(got.astype(int) - plain).mean() > 2


def test_one_lora_has_a_strength_too(pipe, two):
    tree, scale = loras.read_lora(two[0], pipe)
    want = sample.generate(pipe, ["a"], **SIZE, lora=(tree, 0.25 * scale))
    np.testing.assert_array_equal(sample.generate(pipe, ["a"], **SIZE, lora=(two[0], 0.25)), want)
    nothing = sample.generate(pipe, ["a"], **SIZE, lora=[(two[0], 0)])
    np.testing.assert_array_equal(nothing, sample.generate(pipe, ["a"], **SIZE))


@pytest.mark.parametrize("fmt", lora_files.FORMATS)
def test_both_as_one_file_are_read_back_exactly(pipe, two, tiny, tmp_path, fmt):
    members = list(zip(two, STRENGTHS, strict=True))
    out = tmp_path / ("both" if fmt == "peft" else "both.safetensors")
    assert export_lib.export_loras(str(tiny.pipeline), members, fmt, str(out)) == 0
    tree, scale = loras.read_lora(out, pipe)
    got, want = (trees.flatten(t) for t in (tree, loras.take_loras(members, pipe)))
    assert got.keys() == want.keys() and scale == 1
    for name, x in want.items():  # zeros fill up to the rank of the file
        part = (slice(None),) * (x.ndim - 1) + (slice(x.shape[-1]),)
        if name.endswith("/b"):
            part = (slice(None),) * (x.ndim - 2) + (slice(x.shape[-2]),)
        np.testing.assert_array_equal(got[name][part], x)
        assert np.count_nonzero(got[name]) == np.count_nonzero(x)


def test_a_lower_rank_is_the_best_of_that_rank_and_its_cost_is_told(pipe, two):
    tree = loras.take_loras(list(zip(two, STRENGTHS, strict=True)), pipe)
    small, cost = lora_lib.reduced(tree, 5)
    flat, less = trees.flatten(tree), trees.flatten(small)
    lost = whole = 0.0
    for name in (n for n in flat if n.endswith("/a")):
        path = name.removesuffix("/a")
        full, low = (np.asarray(f[name], np.float64) @ np.asarray(f[f"{path}/b"], np.float64)
                     for f in (flat, less))
        assert less[name].shape[-1] == 5
        values = torch.linalg.svdvals(torch.from_numpy(full)).numpy()
        lost += np.square(values[..., 5:]).sum()
        whole += np.square(full).sum()
        np.testing.assert_allclose(
            np.square(full - low).sum(), np.square(values[..., 5:]).sum(), atol=1e-6, rtol=1e-4
        )
    assert cost == pytest.approx(np.sqrt(lost / whole), rel=1e-6) and 0.01 < cost < 0.5
    assert lora_lib.reduced(tree, 7)[1] < 1e-7


def test_full_weights_hold_both(pipe, two, tiny, tmp_path):
    export_lib.export_loras(
        str(tiny.pipeline), list(zip(two, STRENGTHS, strict=True)), "diffusers",
        str(tmp_path / "full"), full=True,
    )
    want = trees.flatten(merged_by_hand(pipe, two))
    for part in ("tokenizer", "text_encoder", "vae", "scheduler", "model_index.json"):
        (tmp_path / part).symlink_to(tiny.pipeline / part)
    (tmp_path / "full").rename(tmp_path / "transformer")
    for name, x in trees.flatten(load_transformer(load_pipeline(tmp_path, parts=()))).items():
        np.testing.assert_allclose(x, want[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_commands_take_several(two, tiny, tmp_path):
    def run(module, *args):
        done = subprocess.run(
            [sys.executable, "-m", f"dopsd_jax.{module}", f"--model={tiny.pipeline}", *args],
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr + done.stdout

    both = [f"--lora={two[0]}", f"--lora={two[1]}:0.7"]
    said = run("export", *both, "--format=comfyui", f"--out={tmp_path}/b.safetensors", "--rank=7")
    assert "rank 7 keeps all but" in said
    draw = ["--prompt=a fox", "--num_steps=2", "--height=32", "--width=32", "--dtype=float32"]
    run("sample", *draw, *both, f"--out={tmp_path}/both")
    run("sample", *draw, f"--lora={tmp_path}/b.safetensors", f"--out={tmp_path}/one")
    pictures = [next((tmp_path / name).glob("*.png")) for name in ("both", "one")]
    from PIL import Image

    first, second = (np.asarray(Image.open(p)).astype(int) for p in pictures)
    assert np.abs(first - second).max() <= 1 and first.std() > 5


@pytest.mark.parametrize("text,path,strength", [
    ("runs/a", "runs/a", 1.0), ("b.safetensors:0.7", "b.safetensors", 0.7),
    ("gs://bucket/run", "gs://bucket/run", 1.0), ("gs://bucket/run:-1", "gs://bucket/run", -1.0),
    ("a:b/c:2e-1", "a:b/c", 0.2), ("C:\\runs\\a", "C:\\runs\\a", 1.0),
    ("C:\\runs\\a.safetensors:0.5", "C:\\runs\\a.safetensors", 0.5),
])
def test_a_strength_stands_behind_the_path(text, path, strength):
    assert loras.parse(text) == (path, strength)


def test_a_file_with_a_colon_in_its_name_is_that_file(tmp_path):
    (tmp_path / "a:2").touch()
    assert loras.parse(f"{tmp_path}/a:2") == (f"{tmp_path}/a:2", 1.0)


@pytest.mark.parametrize("text", ["a:", "a:strong", "a:nan", "a:inf", ":0.5", ""])
def test_what_is_no_strength_is_refused(text):
    with pytest.raises(ValueError, match="expected PATH or PATH:STRENGTH"):
        loras.parse(text)


def test_loras_that_do_not_go_together_are_refused(pipe, two, tiny_flux2, tmp_path):
    other = weights.load_pipeline(tiny_flux2, parts=())
    klein = tmp_path / "klein.safetensors"
    lora_files.save_diffusers(
        klein, random_lora(other, "/attn/", 2, 0), lora_files.LoraSpec(2, 2.0), other.lora.modules
    )
    with pytest.raises(ValueError, match="klein.safetensors"):
        loras.take_loras([two[0], klein], pipe)
    with pytest.raises(ValueError, match=r"0.safetensors: given twice.*sum of their strengths"):
        loras.take_loras([two[0], (two[0], 0.5)], pipe)
    with pytest.raises(ValueError, match="expected a number for the strength, got 'x'"):
        loras.take_loras([(two[0], "x")], pipe)
    with pytest.raises(ValueError, match="got an empty list"):
        loras.take_loras([], pipe)
    with pytest.raises(ValueError, match="(?s)nowhere.*elsewhere"):
        loras.take_loras([two[0], "nowhere", "elsewhere"], pipe)
    wide = random_lora(pipe, "/attention/to_q", 40, 0), 1.0
    with pytest.raises(ValueError, match=r"ranks 40 \+ 40 add up to 80 at .*has 64 inputs"):
        loras.take_loras([wide, wide], pipe)
    assert loras.take_loras([wide, wide], pipe, any_rank=True)


def test_adding_up_is_differentiable_and_keeps_what_is_shared(pipe):
    """The gradient of one LoRA's part is that of this LoRA beside the other in the weights."""
    first, second = (random_lora(pipe, "/attention/to_q", rank, rank) for rank in (2, 3))

    def loss(variables):
        return jnp.sum(jnp.square(velocity_of(variables)))

    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 4, 4, 4)).astype(np.float32)
    ctx = Context(rng.standard_normal((1, 64, pipe.denoiser.text_width)).astype(np.float32),
                  np.ones((1, 64), bool))

    def velocity_of(variables):
        return pipe.denoiser.velocity(variables, x, np.float32([0.5]), ctx)

    got = jax.grad(lambda tree: loss(
        {"params": pipe.params, "lora": lora_lib.combined([first, tree])}
    ))(second)
    folded = lora_lib.merge(pipe.params, first, 1.0)
    want = jax.grad(lambda tree: loss({"params": folded, "lora": tree}))(second)
    for name, g in trees.flatten(want).items():
        np.testing.assert_allclose(
            trees.flatten(got)[name], g, atol=2e-5 * np.abs(g).max(), err_msg=name
        )
