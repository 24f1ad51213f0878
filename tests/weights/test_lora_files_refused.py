"""LoRA files and trees that are refused, and what the refusal says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from lora_examples import BLOCK, SPEC, TINY, Z_IMAGE_MODULES, random_lora, shapes_of, torch_file
from safetensors.numpy import load_file, save_file

from dopsd_jax.core import trees
from dopsd_jax.weights.lora_files import (
    FORMATS,
    LoraFileError,
    LoraSpec,
    read_lora,
    save_comfyui,
    save_diffusers,
    save_peft,
)


def fails(text, *args, f=read_lora):
    with pytest.raises(LoraFileError, match=text) as e:
        f(*args)
    return str(e.value)


@pytest.fixture
def tensors(tmp_path):
    """The tensors of a good diffusers file, and how to write and read a changed one."""
    save_diffusers(tmp_path / "good.safetensors", random_lora(BLOCK), SPEC, Z_IMAGE_MODULES)

    def read(tensors, shapes=None):
        save_file(tensors, tmp_path / "bad.safetensors")
        return read_lora(tmp_path / "bad.safetensors", Z_IMAGE_MODULES, shapes)

    return load_file(tmp_path / "good.safetensors"), read


A = "transformer.layers.1.attention.to_q.lora_A.weight"
B = "transformer.layers.1.attention.to_q.lora_B.weight"


def test_all_that_is_wrong_with_the_names_is_said_at_once(tensors):
    t, read = tensors
    t["transformer.layers.1.attention.qkv.lora_A.weight"] = t[A]
    t["transformer.layers.1.attention.to_q.hada_w1_a"] = np.zeros((3, 3), np.float32)
    t["text_encoder.layers.1.lora_A.weight"] = t[A]
    del t[B], t["transformer.noise_refiner.0.feed_forward.w2.lora_A.weight"]
    text = fails(r"bad\.safetensors: 7 problems", t, f=read)
    for line in (
        "expected one prefix on all keys, got none, transformer.; split the file",
        f"transformer.layers.1.attention.qkv.lora_A.weight: stands for the same weight as {A}",
        "transformer.layers.1.attention.to_q.hada_w1_a: unknown key, of LoHa",
        "text_encoder.layers.1.lora_A.weight: unknown key",
        f"{A}: lora_B of the same module is missing",
        "transformer.noise_refiner.0.feed_forward.w2.lora_B.weight: lora_A of the same module is",
        "layers/attention/to_q: expected all 2 layers, got 1, missing 1; a DoRA of some layers "
        "only is not read, nor any file of some without the network's shapes",
    ):
        assert line in text


def test_a_dora_of_some_layers_and_a_peft_adapter_of_several_ranks_are_refused(tmp_path):
    lora = random_lora(BLOCK)
    save_peft(tmp_path, lora, SPEC, Z_IMAGE_MODULES)
    t = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (f"base_model.model.{key.removeprefix('transformer.')}" for key in (A, B))
    save_file({**t, a: np.zeros((5, 64), np.float32), b: np.zeros((64, 5), np.float32)},
              tmp_path / "adapter_model.safetensors")
    fails(r"one rank in all modules of a PEFT adapter \(rank_pattern is not read\), got 3, 5",
          tmp_path, Z_IMAGE_MODULES)
    q = A.replace("lora_A.weight", "")
    save_file({f"{q}lora_A.weight": np.ones((3, 64), np.float32),
               f"{q}lora_B.weight": np.ones((64, 3), np.float32),
               f"{q}lora_magnitude_vector": np.ones(64, np.float32)}, tmp_path / "d.safetensors")
    fails("layers/attention/to_q: expected all 2 layers, got 1, missing 0; a DoRA of some layers",
          tmp_path / "d.safetensors", Z_IMAGE_MODULES, shapes_of(lora))


@pytest.mark.parametrize("key,shape,text", [
    (A, (3, 32), r"to_q: expected one shape in all layers, got .*\(32,\)"),
    (A, (2, 64), r"to_q.lora_A.weight: expected \(r, in\) beside \(out, r\), got \(2, 64\) beside"),
    (A, (3, 64, 1, 1), r"expected \(r, in\) beside \(out, r\), got \(3, 64, 1, 1\) beside"),
    (A.replace("lora_A.weight", "alpha"), (2,), r"to_q.alpha: expected one number, got \(2,\)"),
])
def test_wrong_shapes_are_refused(tensors, key, shape, text):
    t, read = tensors
    t[key] = np.zeros(shape, np.float32)
    fails(text, t, f=read)


def test_shapes_and_layers_are_checked_against_the_network(tensors):
    t, read = tensors
    shapes = trees.flatten(shapes_of(random_lora(BLOCK)))
    shapes["layers/attention/to_q/kernel"] = jax.ShapeDtypeStruct((3, 96, 96), jnp.float32)
    shapes["layers/attention/to_k/kernel"] = jax.ShapeDtypeStruct((1, 64, 64), jnp.float32)
    del shapes["noise_refiner/feed_forward/w1/kernel"]
    text = fails("4 problems", t, trees.unflatten(shapes), f=read)
    for line in (
        f"{A}: expected (r, 96) and (out, r) = (96, r), got (3, 64) and (64, 3); is it of another",
        "layers/attention/to_k: the network has 1 layers, the file one 1",
        "w1.lora_A.weight: the network has no parameter noise_refiner/feed_forward/w1/kernel",
    ):
        assert line in text


def test_absurd_layer_index_is_reported_not_allocated(tensors):
    t, read = tensors
    t = {k.replace("layers.1.", "layers.999999999999."): v for k, v in t.items()}
    fails("expected all 1000000000000 layers, got 2, missing 1, 2, 3, .* ..;", t, f=read)


def test_values_that_cannot_be_used_are_refused(tensors):
    t, read = tensors
    fails("expected floats .*, got I32", {**t, A: t[A].astype(np.int32)}, f=read)
    fails(f"{A}: holds NaN or infinity", {**t, A: t[A] * np.float32(np.nan)}, f=read)
    alpha = A.replace("lora_A.weight", "alpha")
    fails("alpha: expected a number but 0, got 0.0", {**t, alpha: np.zeros((), np.float32)}, f=read)


def test_files_that_are_no_lora_of_this_model_are_refused(tensors, tmp_path):
    t, read = tensors
    weights = {k: v.numpy() for k, v in ZImageTransformer2DModel(**TINY).state_dict().items()}
    fails(r"expected LoRA tensors .* found 73 others such as all_final.* this is no LoRA", weights,
          f=read)
    flux = {k.replace("layers", "transformer_blocks").replace("attention", "attn"): v
            for k, v in t.items() if ".layers." in k}
    fails(r"none of its 28 tensors belongs to this network: expected modules such as "
          r"layers\.0\.attention\.to_q, found .*; it was made for another model", flux, f=read)
    fails("no such file", tmp_path / "missing.safetensors", Z_IMAGE_MODULES)
    whole = (tmp_path / "good.safetensors").read_bytes()
    for size in (0, 5, 500, len(whole) - 1):
        (tmp_path / "bad.safetensors").write_bytes(whole[:size])
        fails("truncated or not a safetensors file", tmp_path / "bad.safetensors", Z_IMAGE_MODULES)


def test_pickles_are_refused(tmp_path):
    for suffix in (".bin", ".pt", ".ckpt"):
        torch.save({}, tmp_path / f"adapter_model{suffix}")
        fails("a pickled file can run code", tmp_path / f"adapter_model{suffix}", Z_IMAGE_MODULES)
    fails(r"found only pickled weights \(adapter_model.bin, .*\); these can run code", tmp_path,
          Z_IMAGE_MODULES)


def test_directories_without_one_clear_file_are_refused(tmp_path):
    fails("or a single .safetensors file, found none", tmp_path, Z_IMAGE_MODULES)
    for name in "ab":
        save_diffusers(tmp_path / f"{name}.safetensors", random_lora(BLOCK), SPEC, Z_IMAGE_MODULES)
    fails("found a.safetensors, b.safetensors; name the file itself", tmp_path, Z_IMAGE_MODULES)


def test_peft_config_must_be_there_and_mean_plain_lora(tmp_path):
    path = tmp_path / "lora"
    save_peft(path, random_lora(BLOCK), SPEC, Z_IMAGE_MODULES)
    config = json.loads((path / "adapter_config.json").read_text())

    def with_config(text, **changes):
        (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return fails(text, path, Z_IMAGE_MODULES)

    text = with_config("its LoRA config: 4 problems", use_rslora=True, r=8, lora_alpha=None,
                       alpha_pattern={"to_q": 1})
    for line in ("use_rslora: expected False, got True", "r: expected 3 as in the tensors, got 8",
                 "alpha_pattern: expected {}, got {'to_q': 1}; such a LoRA is not read here",
                 "lora_alpha: expected a number other than 0, got None"):
        assert line in text
    (path / "adapter_config.json").write_text("{")
    fails("adapter_config.json: not valid JSON", path, Z_IMAGE_MODULES)
    (path / "adapter_config.json").unlink()
    fails("adapter_config.json: no such file; a PEFT adapter keeps its alpha there", path,
          Z_IMAGE_MODULES)


@pytest.mark.parametrize("changes,text", [
    ({"lora_alpha": True}, "lora_alpha: expected a number other than 0, got True"),
    ({"r": 3.0}, "r: expected 3 as in the tensors, got 3.0"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path: expected a text, got 3"),
])
def test_wrong_types_in_a_peft_config_are_refused(tmp_path, changes, text):
    save_peft(tmp_path / "lora", random_lora(BLOCK), SPEC, Z_IMAGE_MODULES)
    file = tmp_path / "lora/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert "adapter_model.safetensors" in fails(text, tmp_path / "lora", Z_IMAGE_MODULES)


@pytest.mark.parametrize("ours,text", [
    ({"scale_in_b": True}, "rank: missing; expected a whole number of at least 1; alpha: missing"),
    ({"rank": 3, "alpha": 7.0, "scale_in_b": True}, "base_model: missing; expected a text"),
    ({"rank": 3, "alpha": "x", "base_model": ""}, "alpha: expected a number other than 0, got 'x'"),
    ({"rank": 3, "alpha": 7.0, "base_model": 3}, "base_model: expected a text, got 3"),
    ({"rank": 3, "alpha": 7.0, "base_model": "", "scale_in_b": 1}, "expected true or false, got 1"),
])
def test_damaged_metadata_of_our_own_is_refused(tmp_path, ours, text):
    file = torch_file(tmp_path / "x.safetensors", random_lora(BLOCK), "transformer.{}",
                      metadata={"dopsd_jax_lora": json.dumps(ours)})
    assert "x.safetensors, dopsd_jax_lora: " in fails(text, file, Z_IMAGE_MODULES)


def test_alpha_in_two_places_is_refused(tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 3})}
    file = torch_file(tmp_path / "x.safetensors", random_lora(BLOCK), "transformer.{}", alpha=7,
                      metadata=metadata)
    fails("expected alpha in the config or in .alpha tensors, got both", file, Z_IMAGE_MODULES)


@pytest.mark.parametrize("form", FORMATS)
def test_trees_that_no_file_can_hold_are_refused(tmp_path, form):
    flat = trees.flatten(random_lora(BLOCK))
    flat["layers/attention/norm_q/a"] = flat["layers/attention/to_q/a"]
    del flat["layers/attention/to_k/b"]
    flat["layers/attention/to_v/a"] = flat["layers/attention/to_v/a"][..., :2]
    flat["layers/feed_forward/w1/b"] = flat["layers/feed_forward/w1/b"] * np.nan
    for leaf in "ab":
        flat[f"layers/feed_forward/w2/{leaf}"] = flat[f"layers/feed_forward/w2/{leaf}"][:1]
    path = tmp_path / ("lora" if form == "peft" else "lora.safetensors")
    text = fails("5 problems", path, trees.unflatten(flat), SPEC, Z_IMAGE_MODULES, f=FORMATS[form])
    for line in (
        "layers/attention/norm_q/a: no a or b of a module this network's LoRA files can name",
        "layers/attention/to_k: expected a and b, got only a",
        "layers/attention/to_v: expected a [layers, in, 3] and b [layers, 3, out], got (2, 64, 2) "
        "and (2, 3, 64)",
        "layers/feed_forward/w1: holds NaN or infinity",
        "layers.: expected one number of layers, got [1, 2]",
    ):
        assert line in text
    fails("the LoRA is empty", path, {}, SPEC, Z_IMAGE_MODULES, f=FORMATS[form])
    assert list(tmp_path.iterdir()) == []


def test_impossible_specs_are_refused():
    fails("expected a LoRA rank of at least 1 and a finite alpha other than 0, got rank 0, alpha 1",
          0, 1.0, f=LoraSpec)
    fails("got rank 4, alpha nan", 4, float("nan"), f=LoraSpec)


def test_peft_replaces_an_adapter_but_no_other_directory(tmp_path):
    path, lora = tmp_path / "lora", random_lora(BLOCK)
    path.mkdir()
    save_peft(path, random_lora(BLOCK, seed=5), SPEC, Z_IMAGE_MODULES)
    save_peft(path, lora, LoraSpec(3, 1.0), Z_IMAGE_MODULES)
    got, spec = read_lora(path, Z_IMAGE_MODULES)
    assert spec == LoraSpec(3, 1.0)
    jax.tree.map(np.testing.assert_array_equal, got, lora)
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]

    (path / "notes.txt").write_text("mine")
    fails("expected a new or empty directory or an earlier PEFT adapter, found a directory with "
          "notes.txt; choose another name", path, lora, SPEC, Z_IMAGE_MODULES, f=save_peft)
    (tmp_path / "file").write_text("mine")
    fails("found a file", tmp_path / "file", lora, SPEC, Z_IMAGE_MODULES, f=save_peft)
    fails("expected the name of a directory", tmp_path / "x.safetensors", lora, SPEC,
          Z_IMAGE_MODULES, f=save_peft)
    fails(r"expected the name of a file that ends in \.safetensors", tmp_path / "x.ckpt", lora,
          SPEC, Z_IMAGE_MODULES, f=save_comfyui)
    assert (path / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("form", FORMATS)
def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, form, monkeypatch):
    path = tmp_path / ("lora" if form == "peft" else "lora.safetensors")
    lora = random_lora(BLOCK)
    FORMATS[form](path, lora, SPEC, Z_IMAGE_MODULES)

    def full_disk(file, *contents):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("dopsd_jax.weights.lora_files._write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        FORMATS[form](path, random_lora(BLOCK, seed=9), SPEC, Z_IMAGE_MODULES)
    got = read_lora(path, Z_IMAGE_MODULES)[0]
    if form != "diffusers":
        jax.tree.map(np.testing.assert_array_equal, got, lora)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
