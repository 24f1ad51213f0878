"""Quantised weights beside a model: read back as they were made, and made again when they must."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dopsd_jax.core import trees
from dopsd_jax.models import quantization
from dopsd_jax.weights import fingerprints, quantized_cache
from dopsd_jax.weights.names import WeightsError
from dopsd_jax.weights.pipeline import load_pipeline, load_vision_language


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny models that may be written to."""
    made = type(tiny)(tmp_path / "pipeline", tmp_path / "vlm")
    for old, new in zip((tiny.pipeline, tiny.vlm), (made.pipeline, made.vlm), strict=True):
        shutil.copytree(old, new)
    return made


def load_transformer(model, kind="int8", **options):
    return load_pipeline(model.pipeline, parts=("transformer",), base_dtype=kind,
                         cache_quantised=True, **options).params


def assert_same(got, want):
    got, want = trees.flatten(got), trees.flatten(want)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert type(got[name]) is type(x), name
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(x), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def written(directory):
    return sorted(f.name for f in directory.glob(".quantised/*"))


@pytest.mark.parametrize("kind", quantization.KINDS)
def test_the_second_start_reads_what_the_first_made(model, kind, monkeypatch):
    plain = load_pipeline(model.pipeline, parts=("transformer",), base_dtype=kind).params
    assert written(model.pipeline) == []
    assert_same(load_transformer(model, kind), plain)
    assert len(written(model.pipeline)) == 1
    monkeypatch.setattr("dopsd_jax.weights.pipeline.load_tree", None)  # reads and quantises
    again = load_transformer(model, kind)
    assert_same(again, plain)
    assert quantization.is_quantised(again["layers"]["attention"]["to_q"]["kernel"])


def test_encoders_are_kept_beside_their_own_models(model, monkeypatch):
    how = {"encoder_dtype": "nf4", "cache_quantised": True}

    def load_both():
        pipe = load_pipeline(model.pipeline, parts=("text_encoder",), **how)
        return pipe.text_params, load_vision_language(model.vlm, pipe, **how).params

    first = load_both()
    assert [f.split("_")[0] for f in written(model.pipeline)] == ["text"]
    assert [f.split("_")[0] for f in written(model.vlm)] == ["vlm"]
    monkeypatch.setattr("dopsd_jax.weights.pipeline.load_tree", None)
    assert_same(load_both(), first)


def test_both_kinds_of_int8_share_a_file_and_others_do_not(model):
    load_transformer(model, "int8")
    kept = load_transformer(model, "w8a8")
    assert len(written(model.pipeline)) == 1
    kernel = kept["layers"]["attention"]["to_q"]["kernel"]
    assert isinstance(kernel, quantization.IntegerProducts)
    load_transformer(model, "nf4")
    load_transformer(model, "int8", dtype="float32")
    assert len(written(model.pipeline)) == 3


def test_other_weights_are_another_file(model):
    load_transformer(model)
    file = next((model.pipeline / "transformer").glob("*.safetensors"))
    values = load_file(file)
    name = next(n for n, x in values.items() if x.ndim == 2)
    values[name] = values[name] + np.asarray(1, values[name].dtype)
    save_file(values, file, {"format": "pt"})
    fresh = load_transformer(model)
    assert len(written(model.pipeline)) == 2
    assert_same(fresh, load_pipeline(model.pipeline, parts=("transformer",),
                                     base_dtype="int8").params)


def test_the_model_is_the_same_with_a_cache_in_it(model):
    before = fingerprints.fingerprint(model.pipeline)
    load_transformer(model)
    assert fingerprints.fingerprint(model.pipeline) == before


def test_a_damaged_file_is_refused_with_what_to_do(model):
    load_transformer(model)
    (file,) = (model.pipeline / ".quantised").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(WeightsError, match="truncated"):
        load_transformer(model)
    tree = {"a": {"kernel": quantization.quantise(jnp.ones((2, 64, 8)), "nf4")}}
    quantized_cache.write(file, tree)
    with pytest.raises(WeightsError, match=r"lacks .*; delete it, and the next start writes"):
        load_transformer(model)


def test_values_of_other_shapes_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    tree = {"a": {"kernel": quantization.quantise(jnp.ones((2, 64, 8)), "int8")}}
    quantized_cache.write(file, tree)
    other = jax.eval_shape(
        lambda: {"a": {"kernel": quantization.quantise(jnp.ones((2, 64, 4)), "int8")}}
    )
    with pytest.raises(WeightsError, match=r"as int8\[2, 64, 8\], expected int8\[2, 64, 4\]"):
        quantized_cache.read(file, other, None)


@pytest.mark.parametrize("columns", [6, 7])
def test_four_bits_come_back_whatever_the_columns(tmp_path, columns):
    kernel = np.random.default_rng(0).standard_normal((2, 64, columns)).astype(np.float32)
    tree = {"a": {"kernel": quantization.quantise(jnp.asarray(kernel), "nf4")}}
    quantized_cache.write(tmp_path / "x.safetensors", tree)
    shapes = jax.eval_shape(lambda: tree)
    assert_same(quantized_cache.read(tmp_path / "x.safetensors", shapes, None), tree)
    if columns % 2 == 0:
        assert (tmp_path / "x.safetensors").stat().st_size < kernel.size * 2


def test_nothing_half_written_is_left(model, monkeypatch):
    def fails(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(quantized_cache, "save_file", fails)
    with pytest.raises(OSError, match="No space"):
        load_transformer(model)
    assert written(model.pipeline) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_model_that_may_not_be_written_to_is_said_before_it_is_read(model):
    model.pipeline.chmod(0o555)
    with pytest.raises(WeightsError, match="leave out cache_quantised"):
        load_transformer(model)
