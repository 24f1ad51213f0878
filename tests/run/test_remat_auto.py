"""remat=auto: the policy that computes least again and fits, kept for the run."""

import json
import math

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dopsd_jax import train as train_lib
from dopsd_jax.core import memory
from dopsd_jax.run import remat
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.step import Step

NEEDS = {"activations": 50.0, "dots": math.inf, "linears": 20.0, "matmuls": 14.0, "attention": 6.0,
         "full": 3.0}


@pytest.mark.parametrize("free,policy", [
    (50, "activations"), (49, "linears"), (20, "linears"), (19, "matmuls"), (5, "full"),
])
def test_the_first_that_fits_is_taken(free, policy):
    assert remat.choose(NEEDS.__getitem__, free) == policy


def test_where_nothing_fits_what_needs_least_is_taken_and_said(caplog):
    with caplog.at_level("WARNING", logger="dopsd_jax"):
        assert remat.choose(NEEDS.__getitem__, 2) == "full"
    assert "nothing fits" in caplog.text


class Device:
    def __init__(self, limit, in_use):
        self._stats = {"bytes_limit": limit, "bytes_in_use": in_use}

    def memory_stats(self):
        return self._stats


def test_what_lies_on_the_device_beside_the_arguments_is_not_free(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(1000, 300)])
    assert remat.free_memory({}) == pytest.approx(remat.SHARE * 700)


def test_a_device_without_memory_of_its_own_shares_the_machines(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    assert remat.free_memory({}) == pytest.approx(remat.SHARE * 1000 / jax.local_device_count())
    monkeypatch.undo()
    assert 2**20 < memory.available() < 2**50


@pytest.fixture
def config(short_run):
    short_run.sample_every, short_run.preflight = 0, "off"
    return short_run


JITTED = Step.__dict__["jitted"]


class LowerAlone:
    """A jitted function that cannot be called."""

    def __init__(self, jitted):
        self.lower = jitted.lower


def students(state):
    return [np.asarray(x) for x in jax.tree.leaves(state.student)]


def test_a_run_takes_what_fits_and_goes_on_with_it(config, tmp_path, monkeypatch, caplog):
    asked = []
    needed = remat.needed

    def little(step, bucket):
        asked.append(step)
        if len(asked) <= 3:
            return 4.0
        needed(step, bucket)
        return 2.0

    monkeypatch.setattr(remat, "needed", little)
    monkeypatch.setattr(remat, "free_memory", lambda params: 3.0)
    # The program that was found is the one that runs: nothing is left to be compiled.
    monkeypatch.setattr(Step, "jitted", property(lambda self: LowerAlone(JITTED.func(self))))
    found = train_lib.train(config, tmp_path / "auto")
    monkeypatch.undo()
    assert len(asked) == 4
    kept = json.loads((tmp_path / "auto" / remat.FILE).read_text())
    assert kept["policy"] == remat.ORDER[3] == "matmuls"
    config.num_train_steps = 3
    with caplog.at_level("INFO", logger="dopsd_jax"):
        train_lib.train(config, tmp_path / "auto")
    assert len(asked) == 4 and "matmuls, as this run began" in caplog.text

    config.num_train_steps, config.remat = 2, "matmuls"
    for one, two in zip(students(found), students(train_lib.train(config, tmp_path / "by name")),
                        strict=True):
        np.testing.assert_array_equal(one, two)


def test_on_other_devices_the_search_begins_anew(config, tmp_path, monkeypatch, caplog):
    other = remat.Choice("attention", "another card", 1)
    (tmp_path / remat.FILE).write_text(json.dumps(vars(other)))
    assert remat._read(tmp_path / remat.FILE) == other

    class Tried:
        with_remat = staticmethod(lambda policy: policy)

    monkeypatch.setattr(remat, "needed", lambda step, bucket: NEEDS[step])
    monkeypatch.setattr(remat, "free_memory", lambda params: 15.0)
    with caplog.at_level("INFO", logger="dopsd_jax"):
        assert remat.fitted(Tried, None, tmp_path, {}) == "matmuls"
    assert "began with attention on 1 x another card" in caplog.text
    kept = remat._read(tmp_path / remat.FILE)
    assert kept == remat.Choice("matmuls", jax.devices()[0].device_kind, jax.device_count())


@pytest.mark.parametrize("content", ["{}", '{"policy": "some", "device": "cpu", "devices": 1}'])
def test_a_damaged_choice_is_told(tmp_path, content):
    (tmp_path / remat.FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{remat.FILE}: expected the policy, device and devices"):
        remat._read(tmp_path / remat.FILE)


def test_a_run_begun_with_a_policy_of_its_own_keeps_it(tmp_path):
    config = ConfigDict({"remat": "auto", "seed": 1})
    assert remat.as_begun(config, tmp_path) is config
    (tmp_path / "config.json").write_text(json.dumps({"remat": "full", "seed": 1}))
    assert remat.as_begun(config, tmp_path).remat == "full" and config.remat == "auto"
    config.remat = "dots"  # asked for by name: the workdir then says that it is another run
    assert remat.as_begun(config, tmp_path).remat == "dots"
    assert workdir_lib.read_json(tmp_path / "config.json")["remat"] == "full"
