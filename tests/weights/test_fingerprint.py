"""A fingerprint changes with everything that changes a picture, and with nothing else."""

import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dopsd_jax.weights import WeightsError
from dopsd_jax.weights.fingerprints import fingerprint


@pytest.fixture
def copy(tiny, tmp_path):
    shutil.copytree(tiny.pipeline, tmp_path / "model")
    return tmp_path / "model"


def test_the_place_the_dates_and_other_files_do_not_matter(tiny, copy):
    (copy / "README.md").write_text("about")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "download.json").write_text("{}")
    os.utime(copy / "model_index.json", (0, 0))
    assert fingerprint(copy) == fingerprint(tiny.pipeline)


@pytest.mark.parametrize(
    "name", ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
             "tokenizer/tokenizer_config.json", "transformer/config.json"],
)
def test_every_config_and_the_tokenizer_matter(tiny, copy, name):
    (copy / name).write_text((copy / name).read_text() + "\n")
    assert fingerprint(copy) != fingerprint(tiny.pipeline)


def test_a_chat_template_matters_as_a_new_file_and_by_what_it_says(copy):
    found = [fingerprint(copy)]
    for text in ("{{ messages }}", "{{ message }}"):
        (copy / "tokenizer" / "chat_template.jinja").write_text(text)
        found.append(fingerprint(copy))
    assert len(set(found)) == 3


def test_the_place_of_a_file_matters(tiny, copy):
    (copy / "vae" / "config.json").rename(copy / "vae" / "config2.json")
    assert fingerprint(copy) != fingerprint(tiny.pipeline)


@pytest.mark.parametrize("place", [0, 0.31, 0.5, 0.77, 1])
def test_one_weight_of_a_small_file_matters(tiny, copy, place):
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[round(place * (len(tensors) - 1))]
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint(copy) != fingerprint(tiny.pipeline)


@pytest.mark.parametrize("place", [0.02, 0.31, 0.5, 0.77, 0.97])
def test_a_changed_layer_of_a_large_file_matters(tmp_path, place):
    file, size = tmp_path / "model.safetensors", 2**24
    save_file({"w": np.zeros(size, np.uint8)}, file)
    before = fingerprint(tmp_path)
    changed = np.zeros(size, np.uint8)
    begin = int(place * size)
    changed[begin:begin + size // 32] = 1
    save_file({"w": changed}, file)
    assert fingerprint(tmp_path) != before


def test_linked_folders_are_followed(tiny, copy, tmp_path):
    (copy / "vae").rename(tmp_path / "elsewhere")
    (copy / "vae").symlink_to(tmp_path / "elsewhere")
    assert fingerprint(copy) == fingerprint(tiny.pipeline)


def test_nothing_to_identify_is_an_error(tmp_path):
    with pytest.raises(WeightsError, match="nowhere: expected a directory of model weights, found "
                                           "none"):
        fingerprint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"expected \.safetensors files in it or below, found "
                                           r"config.json, pytorch_model.bin"):
        fingerprint(tmp_path)
