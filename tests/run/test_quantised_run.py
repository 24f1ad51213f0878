"""Runs and pictures on a quantised model: those of the floats that its weights stand for."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dopsd_jax import export, sample
from dopsd_jax import train as train_lib
from dopsd_jax.core import trees
from dopsd_jax.core.metrics import read_metrics
from dopsd_jax.method.contexts import text_context
from dopsd_jax.models import quantization
from dopsd_jax.run import loras
from dopsd_jax.weights.pipeline import load_pipeline
from tests import commands
from tests.velocity_error import velocity_of_mini

STACKS = (r"(model\.)?(layers|noise_refiner|context_refiner|language_model\.layers|"
          r"visual\.blocks|visual\.deepstack_merger_list)\.")


@pytest.fixture(scope="module")
def rounded(tiny, tmp_path_factory):
    """The tiny models whose layers' weights are floats that int8 holds."""
    directory = tmp_path_factory.mktemp("rounded")
    made = type(tiny)(directory / "pipeline", directory / "vlm")
    for old, new in zip((tiny.pipeline, tiny.vlm), (made.pipeline, made.vlm), strict=True):
        shutil.copytree(old, new)
    for file in (*made.pipeline.glob("t*r/*.safetensors"), *made.vlm.glob("*.safetensors")):
        tensors = load_file(file)
        for name, w in tensors.items():
            if re.match(STACKS, name) and w.ndim == 2:
                q = quantization.quantise(jnp.asarray(w.T), "int8", jnp.float32)
                tensors[name] = np.ascontiguousarray(quantization.floats(q, jnp.float32).T)
        save_file(tensors, file, {"format": "pt"})
    return made


@pytest.mark.parametrize("family", ["tiny", "tiny_flux2"])
def test_weights_are_quantised_as_they_are_read(request, family):
    model = request.getfixturevalue(family)
    model = getattr(model, "pipeline", model)
    parts = {"dtype": "float32", "parts": ("transformer", "text_encoder")}
    floats = load_pipeline(model, **parts)
    got = load_pipeline(model, **parts, base_dtype="int8", encoder_dtype="nf4")
    for kind, found, want in (("int8", got.params, floats.params),
                              ("nf4", got.text_params, floats.text_params)):
        found = trees.flatten(found)
        want = trees.flatten(quantization.quantise_tree(want, kind, jnp.float32))
        assert found.keys() == want.keys()
        quantised = 0
        for name, x in want.items():
            assert type(found[name]) is type(x)
            if quantization.is_quantised(x):
                quantised += 1
                assert found[name].qtype == x.qtype
                np.testing.assert_array_equal(found[name].qvalue, x.qvalue, err_msg=name)
                np.testing.assert_array_equal(found[name].scale, x.scale, err_msg=name)
            else:
                np.testing.assert_array_equal(found[name], x, err_msg=name)
        assert quantised >= 7


def test_int8_moves_the_mini_model_less_than_twice_as_far_as_bfloat16_does():
    exact = velocity_of_mini(jnp.float32, "")

    def error(kind):
        moved = velocity_of_mini(jnp.bfloat16, kind) - exact
        return float(jnp.linalg.norm(moved) / jnp.linalg.norm(exact))

    rounding = error("")
    assert 0.005 < rounding < 0.03 and 1 < error("int8") / rounding < 2


def test_integer_products_reach_the_network(tiny):
    x, sigma = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 4))), jnp.ones(1)
    found = {}
    for kind in ("int8", "w8a8"):
        pipe = load_pipeline(tiny.pipeline, dtype="float32", base_dtype=kind)
        context = text_context(pipe, ["a fox"], length=32)
        velocity = jax.jit(pipe.denoiser.velocity)
        args = {"params": pipe.params}, x, sigma, context
        text = velocity.lower(*args).as_text()
        assert bool(re.search(r"xi8>, tensor<\d+x\d+xi8>\) -> tensor<\d+x\d+xi32>", text)) == (
            kind == "w8a8"
        )
        found[kind] = np.asarray(velocity(*args))
    moved = np.linalg.norm(found["w8a8"] - found["int8"]) / np.linalg.norm(found["int8"])
    assert 1e-4 < moved < 0.1


def numbers(workdir):
    return [{k: row[k] for k in ("loss", "grad_norm")} for row in read_metrics(workdir)]


def test_a_run_on_int8_is_the_run_on_what_int8_holds(short_run, rounded, tmp_path, caplog):
    short_run.update({"base_dtype": "int8", "encoder_dtype": "int8", "sample_every": 0})
    train_lib.train(short_run, tmp_path / "int8")
    quantised = numbers(tmp_path / "int8")

    said = "It was trained on weights in int8."
    told = "was trained on weights in int8, and is merged"
    run, file = tmp_path / "int8", tmp_path / "lora" / "a.safetensors"
    export.export(str(run), "diffusers", str(file))
    assert said in (file.parent / "README.md").read_text()
    # A file tells it as the run does.
    for lora, out in ((run, "merged"), (file, "again")):
        caplog.clear()
        export.export_loras(short_run.model, [str(lora)], "diffusers",
                            str(tmp_path / out), full=True)
        assert f"{lora}: {told} into those of" in caplog.text
        assert said in (tmp_path / out / "README.md").read_text()
    with pytest.raises(ValueError, match="base_dtype"):
        short_run.base_dtype, short_run.num_train_steps = "nf4", 3
        train_lib.train(short_run, tmp_path / "int8")

    short_run.update({"base_dtype": "dtype", "encoder_dtype": "dtype", "num_train_steps": 2})
    short_run.model, short_run.vlm = str(rounded.pipeline), str(rounded.vlm)
    train_lib.train(short_run, tmp_path / "floats")
    floats = numbers(tmp_path / "floats")
    assert len(quantised) == len(floats) == 2
    for a, b in zip(quantised, floats, strict=True):
        assert a == pytest.approx(b, rel=2e-5)


def test_what_a_lora_went_on_from_counts_too(tmp_path):
    def run(name, **changes):
        (tmp_path / name).mkdir()
        config = {"model": "mini", "trainable": "lora", "teacher": "ema", "lora": {}, **changes}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "identity.json").write_text("{}")
        return str(tmp_path / name)

    first = run("first", base_dtype="int8")
    second = run("second", base_dtype="dtype", init_lora=first)
    third = run("third", base_dtype="nf4", init_lora=f"{second}")
    plain = run("plain", init_lora=str(tmp_path / "gone"))  # of before there was the key
    assert loras.base_dtypes([first, second, third, plain]) == {
        first: "int8", second: "int8", third: "int8, nf4"}


def test_full_fine_tuning_of_a_quantised_model_is_refused(short_run, tmp_path):
    short_run.update({"trainable": "full", "base_dtype": "int8"})
    with pytest.raises(ValueError, match="base_dtype: expected dtype with trainable = full"):
        train_lib.train(short_run, tmp_path / "run")


def test_pictures_on_int8_are_those_of_what_int8_holds(tiny, rounded):
    how = {"num_steps": 2, "height": 64, "width": 64, "seed": 1}
    pipe = load_pipeline(tiny.pipeline, dtype="float32", base_dtype="int8", encoder_dtype="int8")
    got = sample.generate(pipe, ["a fox"], **how).astype(int)
    want = sample.generate(load_pipeline(rounded.pipeline, dtype="float32"), ["a fox"], **how)
    assert np.abs(got - want).max() <= 1


def test_prompts_are_encoded_before_the_transformer_is_there(tiny):
    """As the command does it: the text encoder and the transformer are never both in memory."""
    how = {"guidance": 2.0, "negative": "blurred"}
    encoders = load_pipeline(tiny.pipeline, dtype="float32", parts=sample.ENCODERS)
    assert encoders.params is None
    encoded = jax.device_get(sample.encode(encoders, ["a fox", "a cat"], **how))
    drawing = load_pipeline(tiny.pipeline, dtype="float32", parts=sample.DRAWING)
    assert drawing.text_params is None
    how |= {"num_steps": 2, "height": 64, "width": 64, "seed": 1}
    got = sample.generate(drawing, ["a fox", "a cat"], **how, encoded=encoded)
    whole = load_pipeline(tiny.pipeline, dtype="float32")
    np.testing.assert_array_equal(got, sample.generate(whole, ["a fox", "a cat"], **how))


def test_a_cache_with_nothing_to_keep_is_refused(tiny, tmp_path):
    done = commands.run("dopsd_jax.sample", "--model", tiny.pipeline, "--prompt", "a",
                        "--cache_quantised", "--out", tmp_path)
    assert done.returncode and "--cache_quantised: expected a quantised" in done.stderr


def test_the_command_draws_on_int8_and_says_so(tiny, tmp_path):
    out = tmp_path / "out"
    flags = {"model": tiny.pipeline, "prompt": "a fox", "base_dtype": "int8", "height": 64,
             "width": 64, "num_steps": 1, "out": out}
    done = commands.run("dopsd_jax.sample", *(f"--{k}={v}" for k, v in flags.items()))
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.json")
    assert json.loads(made.read_text())["base_dtype"] == "int8"
