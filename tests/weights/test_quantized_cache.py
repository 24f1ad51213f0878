"""Quantised weights beside a model: read back as they were made, and made again when they must."""

import hashlib
import os
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
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
    """Also where size, header and the blocks that are looked at are the same."""
    load_transformer(model)
    file = next((model.pipeline / "transformer").glob("*.safetensors"))
    values = load_file(file)
    name = next(n for n, x in values.items() if x.ndim == 2)
    before = fingerprints.fingerprint(model.pipeline)
    with mock.patch.object(fingerprints, "_sampled", lambda file: hashlib.sha256(b"the same")):
        kept = load_transformer(model, "nf4")
        values[name] = values[name] + np.asarray(1, values[name].dtype)
        save_file(values, file, {"format": "pt"})
        fresh = load_transformer(model, "nf4")
    assert len(written(model.pipeline)) == 3
    plain = load_pipeline(model.pipeline, parts=("transformer",), base_dtype="nf4").params
    assert_same(fresh, plain)
    assert any(
        not np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(fresh), strict=True)
    )
    assert fingerprints.fingerprint(model.pipeline) != before


def test_the_model_is_the_same_with_a_cache_in_it(model):
    before = fingerprints.fingerprint(model.pipeline)
    load_transformer(model)
    assert fingerprints.fingerprint(model.pipeline) == before


@pytest.mark.parametrize("damage,message", [
    (lambda file: file.write_bytes(file.read_bytes()[:-10]), "truncated"),
    (lambda file: file.write_bytes(b""), "truncated"),
    (lambda file: file.unlink(), "no such file"),
    (lambda file: save_file({"values": np.zeros((2, 3), np.int8)}, file),
     r"has values as int8\[2, 3\], expected int8"),
    (lambda file: save_file({"scale": np.zeros((2, 3), np.int8)}, file), "lacks values"),
])
def test_a_damaged_file_is_refused_with_what_to_do(model, damage, message):
    load_transformer(model)
    damage(next((model.pipeline / ".quantised").glob("*/*to_q.kernel.safetensors")))
    advice = r"; delete .*\.quantised/transformer_int8\S*, and the next start writes it again"
    with pytest.raises(WeightsError, match=f"{message}.*{advice}"):
        load_transformer(model)


@pytest.mark.parametrize("columns", [6, 7])
def test_four_bits_come_back_whatever_the_columns(tmp_path, columns):
    kernel = np.random.default_rng(0).standard_normal((2, 64, columns)).astype(np.float32)
    tree = {"a": {"kernel": quantization.quantise(jnp.asarray(kernel), "nf4")}}
    quantized_cache.write(tmp_path / "x", tree)
    shapes = jax.eval_shape(lambda: tree)
    assert_same(quantized_cache.read(tmp_path / "x", shapes, None), tree)
    (values,) = (t for n, t in load_file(tmp_path / "x" / "a.kernel.safetensors").items()
                 if n == "values")
    assert values.size == kernel.size / (1 if columns % 2 else 2)


def test_what_cannot_be_written_is_a_warning_and_leaves_nothing(model, monkeypatch, caplog):
    calls = []

    def fails(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            raise SafetensorError("No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(quantized_cache, "save_file", fails)
    got = load_transformer(model)
    assert_same(got, load_pipeline(model.pipeline, parts=("transformer",),
                                   base_dtype="int8").params)
    assert "could not be written (No space left on device); the next start" in caplog.text
    assert written(model.pipeline) == []


def test_a_folder_that_cannot_be_made_is_a_warning(model, caplog):
    (model.pipeline / ".quantised").write_text("in the way")
    load_transformer(model)
    assert "could not be written" in caplog.text


def test_others_may_read_it_and_what_a_killed_process_left_goes(model):
    left = [model.pipeline / ".quantised" / f"{n}.partial" for n in ("old", "new")]
    for folder in left:
        folder.mkdir(parents=True)
    os.utime(left[0], (0, 0))
    load_transformer(model)
    assert [f.exists() for f in left] == [False, True]
    (folder,) = (model.pipeline / ".quantised").glob("transformer*")
    asked = folder.stat().st_mode & 0o666
    assert {f.stat().st_mode & 0o777 for f in folder.iterdir()} == {asked}


def test_several_processes_leave_it_alone(model, monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    load_transformer(model)
    assert written(model.pipeline) == [] and "by a run of several processes" in caplog.text
