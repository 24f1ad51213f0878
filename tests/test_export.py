"""The export command, and what a run's directory must hold to be read."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dopsd_jax import export as export_lib
from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.models.z_image import ZImageConfig
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.z_image import Z_IMAGE

Z_IMAGE_MODULES = Z_IMAGE.modules(ZImageConfig())

CONFIG = {"model": "m", "trainable": "lora", "teacher": "ema", "lora": {"rank": 2, "alpha": 4.0}}


def make_run(workdir, steps=(3,), **changes):
    """A directory as a run of two layers leaves it; the teacher is half the student."""
    workdir_lib.claim(workdir, CONFIG | changes, {})
    rng = np.random.default_rng(0)
    pair = {"a": jnp.asarray(rng.standard_normal((2, 8, 2)), jnp.float32),
            "b": jnp.asarray(rng.standard_normal((2, 2, 8)), jnp.float32)}
    half = {k: x / 2 for k, x in pair.items()}
    checkpoints = Checkpoints(workdir / "checkpoints")
    for step in steps:
        checkpoints.save(step, {
            "student": {"layers": {"attention": {"to_q": pair}}},
            "teacher": {"layers": {"attention": {"to_q": half}}},
        }, {"step": step})
    checkpoints.close()
    return workdir


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def place(tmp_path, fmt):
    return tmp_path / ("lora" if fmt == "peft" else "lora.safetensors")


@pytest.mark.parametrize("fmt", lora_files.FORMATS)
def test_our_own_export_is_replaced(run, tmp_path, fmt):
    out = place(tmp_path, fmt)
    export_lib.export(run, fmt, out)
    export_lib.export(run, fmt, out, role="teacher")
    got, _ = lora_files.read_lora(out, Z_IMAGE_MODULES)
    want, _ = workdir_lib.read_lora(run, role="teacher")
    pair = got["layers"]["attention"]["to_q"], want["layers"]["attention"]["to_q"]
    np.testing.assert_allclose(pair[0]["a"], pair[1]["a"])


@pytest.mark.parametrize("fmt", lora_files.FORMATS)
def test_a_foreign_lora_is_replaced_only_when_told(run, tmp_path, fmt):
    out = place(tmp_path, fmt)
    export_lib.export(run, fmt, out)
    file = out / "adapter_model.safetensors" if fmt == "peft" else out
    save_file(load_file(file), file, {"format": "pt"})  # as another tool would have written it
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"{out}: exists and was not written by dopsd_jax; choose "
                                         "another name, or pass --overwrite"):
        export_lib.export(run, fmt, out)
    assert file.read_bytes() == before
    export_lib.export(run, fmt, out, overwrite=True)
    assert file.read_bytes() != before
    export_lib.export(run, fmt, out)


@pytest.mark.parametrize("content", [b"", b"notes", bytes(100)])
def test_any_other_file_is_foreign(run, tmp_path, content):
    out = tmp_path / "x.safetensors"
    out.write_bytes(content)
    with pytest.raises(ValueError, match="was not written by dopsd_jax"):
        export_lib.export(run, "comfyui", out)
    assert out.read_bytes() == content
    out = tmp_path / "peft"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by dopsd_jax"):
        export_lib.export(run, "peft", out)


def test_overwrite_never_removes_a_directory_of_other_things(run, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="found a directory with notes.txt"):
        export_lib.export(run, "peft", out, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_a_file_on_the_way_is_named_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"/file: expected a directory, found a file"):
        export_lib.export(tmp_path / "nowhere", "comfyui", tmp_path / "file/x.safetensors")


def test_the_teacher_of_a_run_without_one_is_refused(tmp_path):
    live = make_run(tmp_path / "live", teacher="live")
    with pytest.raises(ValueError, match="teacher=live, its teacher is the student itself; take "
                                         "the role student"):
        export_lib.export(live, "comfyui", tmp_path / "x.safetensors", role="teacher")
    export_lib.export(live, "comfyui", tmp_path / "x.safetensors")


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    workdir_lib.claim(tmp_path / "run", CONFIG, {})
    for _ in range(2):
        assert workdir_lib.is_workdir(tmp_path / "run")
        with pytest.raises(ValueError, match="no checkpoint yet in .*run/checkpoints"):
            export_lib.export(tmp_path / "run", "comfyui", tmp_path / "x.safetensors")
        (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
    assert not (tmp_path / "x.safetensors").exists()


def test_another_step_is_refused_with_those_there_are(tmp_path):
    make_run(tmp_path / "run", steps=(3, 6))
    with pytest.raises(ValueError, match=r"the checkpoint of step 4, found steps \[3, 6\]"):
        export_lib.export(tmp_path / "run", "comfyui", tmp_path / "x.safetensors", step=4)


def test_a_config_of_something_else_is_refused(run):
    (run / "config.json").write_text('{"model": "m"}')
    with pytest.raises(ValueError, match=r"the config of a run, found no \['lora', 'teacher'"):
        workdir_lib.read_lora(run)


@pytest.mark.parametrize("change,message", [
    ({"lora": 3}, "config.json: lora: expected a JSON object, got 3"),
    ({"lora": {"rank": 2}}, "config.json, lora: alpha: missing; expected a number other than 0"),
    ({"lora": {"rank": "2", "alpha": True}}, "rank: expected a whole number .*alpha: expected a n"),
    ({"model": None}, "config.json: model: expected a text, got None"),
])
def test_wrong_values_in_the_config_of_a_run_are_named(run, change, message):
    (run / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=message):
        workdir_lib.read_lora(run)


def test_the_teacher_of_a_run_with_a_frozen_one_is_refused(tmp_path):
    frozen = make_run(tmp_path / "frozen", teacher="frozen")
    with pytest.raises(ValueError, match="teacher=frozen, its teacher is the untrained LoRA, which "
                                         "changes nothing; take the role student"):
        export_lib.export(frozen, "comfyui", tmp_path / "x.safetensors", role="teacher")
