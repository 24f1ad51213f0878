"""Impossible values in the small files of a pipeline: refused by file and key, no traceback."""

import json
import shutil

import pytest

from dopsd_jax.weights import WeightsError, load_pipeline
from dopsd_jax.weights.pipeline import read_vl_config

COUNT = "expected a whole number of at least 1"
TRANSFORMER, TEXT = "transformer/config.json", "text_encoder/config.json"
VAE, SCHEDULER = "vae/config.json", "scheduler/scheduler_config.json"
MISSING = object()


def ignore_weights(_, names):
    return [n for n in names if n.endswith(".safetensors")]


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """Both models without weights, which nothing here reads."""
    directory = tmp_path_factory.mktemp("small")
    shutil.copytree(tiny.pipeline, directory / "pipeline", ignore=ignore_weights)
    shutil.copytree(tiny.vlm, directory / "vlm", ignore=ignore_weights)
    return directory


def refusal(file, change, open_it):
    """The message after `change` of a JSON file, which is put back."""
    text = file.read_text()
    values = json.loads(text)
    change(values)
    file.write_text(json.dumps(values))
    try:
        with pytest.raises(WeightsError) as e:
            open_it()
    finally:
        file.write_text(text)
    assert str(e.value).startswith(f"{file}: ")
    return str(e.value)


@pytest.mark.parametrize("file,key,value,words", [
    (TRANSFORMER, "dim", "abc", f"dim: {COUNT}, got 'abc'"),
    (TRANSFORMER, "dim", None, f"dim: {COUNT}, got None"),
    (TRANSFORMER, "dim", 32.5, f"dim: {COUNT}, got 32.5"),
    (TRANSFORMER, "dim", MISSING, "dim: missing; expected a whole number of at least 1"),
    (TRANSFORMER, "dim", 33, "dim: expected a multiple of n_heads = 4, got 33"),
    (TRANSFORMER, "n_heads", 0, f"n_heads: {COUNT}, got 0"),
    (TRANSFORMER, "n_heads", True, f"n_heads: {COUNT}, got True"),
    (TRANSFORMER, "axes_dims", [1, 2, 3], "axes_dims: expected even numbers whose sum is dim / n_"),
    (TRANSFORMER, "axes_dims", "x", "axes_dims: expected a list of 3 times a whole number of at l"),
    (TRANSFORMER, "axes_lens", [64], "axes_lens: expected a list of 3 times a whole number of at "),
    (TRANSFORMER, "all_patch_size", "2", "all_patch_size: expected a list of 1 times a whole numb"),
    (TRANSFORMER, "norm_eps", "1e-5", "norm_eps: expected a number above 0, got '1e-5'"),
    (TEXT, "num_key_value_heads", 0, f"num_key_value_heads: {COUNT}, got 0"),
    (TEXT, "num_key_value_heads", 3, "expected a multiple of num_key_value_heads = 3, got "),
    (TEXT, "head_dim", "x", f"head_dim: {COUNT}, got 'x'"),
    (TEXT, "rope_parameters", {"rope_theta": "x"}, "rope_theta: expected a number above 0, got "),
    (TEXT, "rope_parameters", 3, "rope_parameters: expected a JSON object or null, got 3"),
    (VAE, "scaling_factor", None, "scaling_factor: expected a number above 0, got None"),
    (VAE, "scaling_factor", 0, "scaling_factor: expected a number above 0, got 0"),
    (VAE, "shift_factor", "a", "shift_factor: expected a number or null, got 'a'"),
    (VAE, "block_out_channels", "x", "block_out_channels: expected a list of a whole number "),
    (VAE, "norm_num_groups", 0, f"norm_num_groups: {COUNT}, got 0"),
    (VAE, "sample_size", None, f"sample_size: {COUNT}, got None"),
    (SCHEDULER, "shift", None, "shift: expected a number above 0, got None"),
    (SCHEDULER, "shift", "a", "shift: expected a number above 0, got 'a'"),
])
def test_an_impossible_value_of_a_pipeline_is_named_with_its_file(small, file, key, value, words):
    def change(values):
        values.pop(key, None)
        if value is not MISSING:
            values[key] = value

    pipeline = small / "pipeline"
    assert words in refusal(pipeline / file, change, lambda: load_pipeline(pipeline, parts=()))


@pytest.mark.parametrize("part,key,value,words", [
    ("vision_config", "depth", 0, f"depth: {COUNT}, got 0"),
    ("vision_config", "num_heads", 3, "hidden_size: expected a multiple of 4 num_heads = 12, got "),
    ("vision_config", "num_position_embeddings", 37, "expected a square number, got 37"),
    ("vision_config", "deepstack_visual_indexes", [0, 99], "expected layers below depth = "),
    ("vision_config", "deepstack_visual_indexes", "x", "expected a list of layers, got 'x'"),
    (None, "vision_config", 3, "vision_config: expected a JSON object, got 3"),
    (None, "text_config", None, "text_config: expected a JSON object, got None"),
    (None, "image_token_id", "x", "image_token_id: expected a whole number of at least 0, got 'x'"),
    ("text_config", "head_dim", 10, "expected numbers whose sum is half of head_dim = 10, got ["),
])
def test_an_impossible_value_of_the_vlm_is_named_with_its_file(small, part, key, value, words):
    def change(values):
        (values if part is None else values[part])[key] = value

    vlm = small / "vlm"
    assert words in refusal(vlm / "config.json", change, lambda: read_vl_config(vlm))


def test_all_impossible_values_are_told_together(small):
    message = refusal(
        small / "pipeline" / TRANSFORMER, lambda v: v.update(dim=0, n_heads=None, qk_norm=False),
        lambda: load_pipeline(small / "pipeline", parts=()),
    )
    for words in ("qk_norm: expected True", f"dim: {COUNT}, got 0", "n_heads: expected "):
        assert words in message
