"""A run's directory: who may write there."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dopsd_jax.run import workdir as workdir_lib

ROOT = Path(__file__).parents[2]
CLAIM = "import sys; from dopsd_jax.run import workdir; workdir.claim(sys.argv[1], {}, {})"


def claim_elsewhere(workdir):
    """Claims in a process of its own, which then ends."""
    return subprocess.run(
        [sys.executable, "-c", CLAIM, str(workdir)], cwd=ROOT, capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)), check=False,
    )


def test_a_second_process_is_refused_while_the_first_lives(tmp_path):
    workdir_lib.claim(tmp_path, {}, {})
    workdir_lib.claim(tmp_path, {}, {})  # the process that has it may claim it again
    refused = claim_elsewhere(tmp_path)
    assert refused.returncode
    assert f"another process is training in {tmp_path} (process {os.getpid()}" in refused.stderr


def test_a_process_that_ended_leaves_no_lock(tmp_path):
    assert claim_elsewhere(tmp_path).returncode == 0
    workdir_lib.claim(tmp_path, {}, {})


def test_a_refused_process_changes_nothing(tmp_path):
    claim_elsewhere(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with (tmp_path / ".lock").open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is training in"):
            workdir_lib.claim(tmp_path, {"seed": 1}, {})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError("No locks available")

    monkeypatch.setattr(workdir_lib.fcntl, "flock", unsupported)
    workdir_lib.claim(tmp_path, {"seed": 1}, {})
    assert "cannot be locked (No locks available)" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}


def test_a_start_that_failed_before_its_first_checkpoint_claims_nothing(tmp_path):
    workdir_lib.claim(tmp_path, {"seed": 1}, {"data": "a"})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir()
    workdir_lib.claim(tmp_path, {"seed": 2}, {"data": "b"})
    (tmp_path / "checkpoints" / "10").mkdir()
    with pytest.raises(ValueError, match=r"seed: the run has 2, now 3(.|\n)*contents of data"):
        workdir_lib.claim(tmp_path, {"seed": 3}, {"data": "c"})


@pytest.fixture
def run(tmp_path):
    """The directory of a run with one checkpoint."""
    (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
    for name in ("config.json", "identity.json"):
        (tmp_path / "run" / name).write_text("{}")
    return tmp_path / "run"


def test_a_run_may_continue_elsewhere_but_not_with_another_method(run):
    old = {"seed": 1, "vae_dtype": "float32", "mesh": {"data": -1, "fsdp": 1}, "lora": {"rank": 2}}
    (run / "config.json").write_text(json.dumps(old))
    new = old | {"mesh": {"data": 2, "fsdp": 4}}
    workdir_lib.claim(run, new, {})
    with pytest.raises(ValueError, match=r"values:\n  lora.rank: the run has 2, now 4$"):
        workdir_lib.claim(run, new | {"lora": {"rank": 4}}, {})


def test_the_dtype_of_the_vae_may_change_only_where_it_encodes_nothing(run):
    (run / "config.json").write_text('{"vae_dtype": "float32"}')
    with pytest.raises(ValueError, match="vae_dtype: the run has 'float32', now 'bfloat16'$"):
        workdir_lib.claim(run, {"vae_dtype": "bfloat16"}, {}, encodes_images=True)
    workdir_lib.claim(run, {"vae_dtype": "bfloat16"}, {}, encodes_images=False)


@pytest.mark.parametrize("name", ["config.json", "identity.json"])
def test_a_run_whose_records_are_lost_is_not_taken_over(run, name):
    (run / name).unlink()
    before = {p.name for p in run.iterdir()} | {".lock"}
    with pytest.raises(ValueError, match=f"run/{name}: missing, but the run has other files here"):
        workdir_lib.claim(run, {}, {})
    assert {p.name for p in run.iterdir()} == before
    (run / name).write_text("{")
    with pytest.raises(ValueError, match=f"run/{name}: not valid JSON"):
        workdir_lib.claim(run, {}, {})


def test_a_directory_with_files_of_others_is_refused_and_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds config.json, model.safetensors and no run"):
        workdir_lib.claim(tmp_path, {"seed": 1}, {})
    assert (tmp_path / "config.json").read_text() == '{"vision_config": {}}'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("key", ["model", "vlm", "data"])
@pytest.mark.parametrize("below", [".", "run"])
def test_a_workdir_in_a_model_or_the_data_is_refused(tmp_path, key, below):
    with pytest.raises(ValueError, match=f"lies in {key} = "):
        workdir_lib.claim(tmp_path / below, {key: str(tmp_path)}, {})
    assert not list(tmp_path.iterdir())


def test_a_new_an_empty_and_a_failed_directory_are_taken(tmp_path):
    workdir_lib.claim(tmp_path / "new", {"seed": 1}, {})
    (tmp_path / "empty").mkdir()
    workdir_lib.claim(tmp_path / "empty", {"seed": 1}, {})
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    workdir_lib.claim(tmp_path / "new", {"seed": 2}, {})


@pytest.mark.parametrize("name", ["checkpoints", "samples"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, name):
    workdir_lib.claim(tmp_path / "run", {}, {})
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"run/{name}: expected a directory, found a file"):
        workdir_lib.claim(tmp_path / "run", {}, {})
