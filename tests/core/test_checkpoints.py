"""Checkpoints whose files were damaged, and directories that are only read."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax.core.checkpoints import Checkpoints

STATE = {"student": {"a": jnp.arange(6.0)}, "step": jnp.int32(3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(directory)
    for step in (6, 9, 12):
        checkpoints.save(step, STATE, {"step": step})
    checkpoints.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def cut(folder, bytes_left):
    for file in (f for f in folder.rglob("*") if f.is_file()):
        file.write_bytes(file.read_bytes()[:bytes_left])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = {
    "cut": lambda step: cut(step / "state", 20),
    "cut_arrays": lambda step: cut(step / "state/d", 20),
    "no_state": lambda step: shutil.rmtree(step / "state"),
    "no_meta": lambda step: shutil.rmtree(step / "meta"),
    "empty": empty,
    "no_arrays": lambda step: (step / "state/manifest.ocdbt").unlink(),
}


def read(directory, part):
    checkpoints = Checkpoints(directory, read_only=part)
    try:
        return checkpoints.restore_part(("student",)) if part else checkpoints.restore(STATE)
    finally:
        checkpoints.close()


@pytest.mark.parametrize("part", [True, False], ids=["export", "train"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_the_good_one_before_it(directory, damage, part):
    DAMAGE[damage](directory / "12")
    message = rf"{directory}/12: damaged \(.+\); delete that folder to continue from step 9$"
    with pytest.raises(ValueError, match=message):
        read(directory, part)
    shutil.rmtree(directory / "12")
    read(directory, part)


def test_only_good_checkpoints_are_recommended(directory):
    for step in ("9", "12"):
        empty(directory / step)
    with pytest.raises(ValueError, match=r"delete that folder to continue from step 6$"):
        read(directory, False)
    empty(directory / "6")
    with pytest.raises(ValueError, match="12: damaged .*there is no earlier good step; delete"):
        read(directory, False)


def test_reading_only_says_and_changes_nothing(directory, caplog):
    (directory / "15.orbax-checkpoint-tmp-3").mkdir()  # a save that may still go on
    before = sorted(directory.rglob("*"))
    np.testing.assert_array_equal(read(directory, True)["student"]["a"], STATE["student"]["a"])
    assert sorted(directory.rglob("*")) == before
    assert not caplog.text
    checkpoints = Checkpoints(directory, read_only=True)
    with pytest.raises(RuntimeError, match="opened to read only"):
        checkpoints.save(20, STATE, {})
    checkpoints.close()
