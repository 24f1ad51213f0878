"""The table of keys, what follows from it, and what may change when a run is continued."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import common
from dopsd_jax import train as train_lib
from dopsd_jax.models.z_image import ZImageConfig
from dopsd_jax.run import keys
from dopsd_jax.run.workdir import flat_config
from dopsd_jax.weights import lora_files, lora_reader
from dopsd_jax.weights.z_image import Z_IMAGE

ROOT = Path(__file__).parents[2]
FREE = {
    "transformer_file", "vae_file", "text_encoder_file", "model", "published",
    "vlm", "data", "data_root", "cache", "base_lora", "init_lora",
    "init_full", "keep_prompts", "earlier_data", "num_train_steps",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "preflight", "log_every", "sample_every",
    "sample_steps", "sample_guidance", "sample_negative", "preview_model", "preview_model_steps",
    "preview_model_shift", "sample_rows", "sample_prompts", "gauge_prompts", "checkpoint_every",
    "keep_checkpoints", "trackers", "cache_quantised",
}


def test_the_config_holds_every_key_of_the_table_and_no_other():
    config = common.base()
    defaults = {name: entry.default for name, entry in keys.KEYS.items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    flat = flat_config(config.to_dict())
    assert flat == plain
    assert {k: type(config[k]) for k in defaults if "." not in k} == {
        k: type(v) for k, v in defaults.items() if "." not in k
    }
    config.lock()
    with pytest.raises(AttributeError):
        config.learning_rates = 1e-3


@pytest.mark.parametrize("name", keys.KEYS)
def test_every_key_of_the_table_is_in_the_docs_and_read_by_the_program(name):
    assert f"\n| `{name}` | " in (ROOT / "docs/keys.md").read_text()
    leaf = re.escape(name.rpartition(".")[2])
    read = rf"(config|c|self\._config)\.(lora\.)?{leaf}\b|config\[.?{leaf}|\"{leaf}\"|mesh\.to_dict"
    sources = [p for p in (ROOT / "dopsd_jax").rglob("*.py") if p.name != "keys.py"]
    assert any(re.search(read, p.read_text()) for p in sources)


def test_the_docs_are_what_the_table_makes():
    """To make them anew: python -m dopsd_jax.run.keys > docs/keys.md"""
    assert (ROOT / "docs/keys.md").read_text() == keys.document()


def test_a_cell_of_the_docs_may_hold_what_ends_a_cell(monkeypatch):
    monkeypatch.setattr(keys, "SECTIONS", {"A": {"seed": keys.key(
        "a|b", keys.TEXT, meaning="one | two"
    )}})
    assert keys.document().endswith("| `seed` | `'a\\|b'` | one \\| two | no |\n")


def test_every_default_but_of_what_must_be_given_keeps_its_own_rule():
    wrong = {name for name, entry in keys.KEYS.items() if not entry.rule.holds(entry.default)}
    assert wrong == {"model", "vlm", "data"}


def test_every_key_affects_what_is_known():
    known = {keys.STUDENT, keys.TEACHER, keys.VISION, keys.LATENTS, keys.STEP, keys.DISPLAY,
             keys.PLACE}
    assert {word for entry in keys.KEYS.values() for word in entry.affects} == known


def test_what_may_change_when_a_run_is_continued():
    every = [*keys.KEYS, "lora", "mesh", "meshes", "lora.mesh", "optimizer.learning_rate"]
    assert {k for k in every if keys.may_change(k, encodes_images=True)} == FREE
    assert {k for k in every if keys.may_change(k, encodes_images=False)} == FREE | {"vae_dtype"}


def test_what_an_entry_of_a_cache_depends_on():
    assert set(keys.affecting(keys.STUDENT)) == {
        "recipe", "text_tokens", "truncate_prompts", "dtype", "encoder_dtype"
    }
    assert set(keys.affecting(keys.TEACHER)) == {
        "recipe", "teacher_tokens", "truncate_prompts", "dtype", "encoder_dtype"
    }
    assert set(keys.affecting(keys.VISION)) == {
        "vlm_rope_theta", "vlm_min_pixels", "vlm_max_pixels", "double_template", "encoder_dtype"
    }
    assert set(keys.affecting(keys.LATENTS)) == {"vae_dtype"}


def test_a_run_whose_vae_encodes_keeps_its_dtype(short_run, tiny_flux2, tmp_path):
    """The target as a reference: another dtype of the VAE would be another run."""
    short_run.update({
        "model": str(tiny_flux2), "vlm": "", "recipe": "edit", "text_tokens": 512,
        "teacher_tokens": 512, "sample_every": 0,
    })
    train_lib.train(short_run, tmp_path / "run")
    short_run.vae_dtype, short_run.num_train_steps = "bfloat16", 3
    message = r"values:\n  vae_dtype: the run has 'float32', now 'bfloat16'$"
    with pytest.raises(ValueError, match=message):
        train_lib.train(short_run, tmp_path / "run")
    short_run.cache = str(tmp_path / "cache")  # whose latents would be others too
    with pytest.raises(ValueError, match=message):
        train_lib.train(short_run, tmp_path / "run")


def test_a_run_whose_vae_only_draws_may_go_on_with_another_dtype(short_run, tmp_path):
    short_run.sample_every = 0
    train_lib.train(short_run, tmp_path / "run")
    short_run.vae_dtype = "bfloat16"
    assert train_lib.train(short_run, tmp_path / "run") is None  # accepted, and finished
    short_run.objective, short_run.vae_dtype = "sft", "float32"
    with pytest.raises(ValueError, match=r"objective: .*\n  vae_dtype: the run has 'bfloat16'"):
        train_lib.train(short_run, tmp_path / "run")


def test_a_base_lora_may_move_but_not_change(short_run, tmp_path, monkeypatch):
    """Its place is free, its content is part of the run's identity."""
    claimed = []
    monkeypatch.setattr(train_lib, "claim", lambda *args: (claimed.append(args[1]), tmp_path)[1])
    monkeypatch.setattr(train_lib.loop, "finished", lambda *args: True)
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        short_run.base_lora = str(tmp_path / f"{name}.safetensors")
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "identity.json").write_text("{}")
        assert train_lib.train(short_run, tmp_path) is None
    here, moved, changed = (identity["base_lora"] for identity in claimed)
    assert here == moved != changed


def test_a_base_lora_is_more_than_its_tensors(tmp_path):
    """A PEFT directory keeps alpha beside them."""
    tree = {"layers": {"attention": {"to_q": {
        "a": np.ones((2, 8, 2), np.float32), "b": np.ones((2, 2, 8), np.float32),
    }}}}
    for name, alpha in (("a", 4.0), ("c", 80.0)):
        lora_files.save_peft(
            tmp_path / name, tree, lora_files.LoraSpec(2, alpha), Z_IMAGE.modules(ZImageConfig())
        )
    # Not written again: safetensors puts the metadata of a file in any order.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = [
        lora_reader.fingerprint(tmp_path / name / "adapter_model.safetensors") for name in "abc"
    ]
    assert found[0] == found[1] != found[2]
    assert lora_reader.fingerprint(tmp_path / "c") == found[2]
