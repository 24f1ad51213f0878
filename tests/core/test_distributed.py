"""How processes are named and refused; where a batch's rows lie. Real ones: test_processes.py."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from dopsd_jax.core import distributed

ROOT = Path(__file__).parents[2]
ADDRESS, COUNT, INDEX = distributed.VARIABLES


@pytest.mark.parametrize("given,environment,expected", [
    ([None] * 3, {}, None),
    ([None] * 3, {ADDRESS: "", COUNT: ""}, None),
    ([None] * 3, {ADDRESS: "a:1", COUNT: "4", INDEX: "3"}, ("a:1", 4, 3)),
    (["b:2", None, None], {ADDRESS: "a:1", COUNT: "4", INDEX: "0"}, ("b:2", 4, 0)),
    (["[::1]:2", 2, 0], {}, ("[::1]:2", 2, 0)),
])
def test_flags_come_before_the_environment(given, environment, expected):
    assert distributed._read(given, environment) == expected


@pytest.mark.parametrize("values,message", [
    (["a:1", None, None], r"several processes need all of --coordinator \(JAX_COORDINATOR_ADDR"),
    (["a:1", "two", "0"], r"expected whole numbers for the last two, got \['two', '0'\]"),
    (["a", "2", "0"], "expected HOST:PORT, a number, and one from 0 below it"),
    (["a:1", "2", "2"], "expected HOST:PORT, a number, and one from 0 below it"),
    (["a:1", "2", "-1"], "expected HOST:PORT, a number, and one from 0 below it"),
])
def test_half_a_name_is_refused(values, message):
    environment = {v: x for v, x in zip(distributed.VARIABLES, values, strict=True) if x}
    with pytest.raises(ValueError, match=message):
        distributed._read([None] * 3, environment)


@pytest.fixture
def calls(monkeypatch):
    """What jax.distributed.initialize was called with; no flags, no environment."""
    values = flags.FlagValues()
    values(["test"])
    monkeypatch.setattr(flags, "FLAGS", values)
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: found.append((a, k)))
    return found


def test_one_process_is_left_alone(calls):
    distributed.initialize()
    assert not calls


def test_on_tpu_no_argument_is_needed(calls, monkeypatch):
    monkeypatch.setattr(distributed, "_on_tpu", lambda: True)
    distributed.initialize()
    assert calls == [((), {"initialization_timeout": distributed.WAIT_S})]


def test_elsewhere_the_environment_says_who_is_who_and_slurm_does_not(calls, monkeypatch):
    for name, value in zip(distributed.VARIABLES, ("h:1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert calls == [(("h:1", 2, 1), {"cluster_detection_method": "deactivate",
                                     "initialization_timeout": distributed.WAIT_S})]


def test_a_machine_that_jax_is_told_to_use_as_a_cpu_is_no_tpu(monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(distributed.Path, "glob", lambda self, pattern: ["accel0"])
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert distributed._on_tpu()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not distributed._on_tpu()


def test_one_process_agrees_with_itself():
    vote = distributed.Vote()
    assert [vote(w) for w in (False, True, False)] == [False, True, False]
    assert distributed.any_process(True) and not distributed.any_process(False)
    distributed.check_same("data", "x")
    with pytest.raises(ValueError, match="^mine$"):
        distributed.on_main(lambda: (_ for _ in ()).throw(ValueError("mine")))


def test_rows_lie_where_device_put_would_put_them():
    script = """
import jax, numpy as np
from dopsd_jax.core import sharding
x = {"a": np.arange(48.).reshape(16, 3), "b": np.arange(16)}
for sizes in ((8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)):
    mesh = sharding.make_mesh(*sizes)
    spread = sharding.batch_sharding(mesh)
    rows = sharding.local_rows(spread, 16)
    assert rows == list(range(16))
    placed = sharding.place_rows(spread, 16, rows, x)
    for name in x:
        want = jax.device_put(x[name], spread)
        assert placed[name].sharding == want.sharding
        for a, b in zip(placed[name].addressable_shards, want.addressable_shards):
            assert a.device == b.device and (np.asarray(a.data) == np.asarray(b.data)).all()
    back = sharding.fetch(placed)
    assert all(isinstance(back[n], np.ndarray) and (back[n] == x[n]).all() for n in x)
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False,
        env=dict(os.environ, PYTHONPATH=str(ROOT),
                 XLA_FLAGS="--xla_force_host_platform_device_count=8"),
    )
    assert done.stdout == "same\n", done.stderr


class Half:
    """A sharding of 8 rows whose process holds those of two devices that are not neighbours."""

    def addressable_devices_indices_map(self, shape):
        return {"a": (slice(6, 8),), "b": (slice(0, 2),), "c": (slice(0, 2),)}


def test_a_process_makes_the_rows_of_its_own_devices_alone(monkeypatch):
    from dopsd_jax.core import sharding

    rows = sharding.local_rows(Half(), 8)
    assert rows == [0, 1, 6, 7]
    asked = []

    def make(shape, where, part):
        assert shape == (8, 2)
        asked.extend(part((s, slice(None))) for s in (slice(6, 8), slice(0, 2), slice(None, 2)))

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    whole = np.arange(16).reshape(8, 2)
    sharding.place_rows(Half(), 8, rows, whole[rows])
    for got, want in zip(asked, (whole[6:], whole[:2], whole[:2]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_tpu_is_looked_for_only_where_there_is_one(tmp_path, monkeypatch):
    modules = {"libtpu": None}
    monkeypatch.setattr(
        distributed.importlib.util, "find_spec", lambda name: name if name in modules else None
    )
    (tmp_path / "0000:00:01.0").mkdir()
    vendor = tmp_path / "0000:00:01.0" / "vendor"
    before = jax.config.jax_platforms

    def chosen(given=""):
        jax.config.update("jax_platforms", given)
        distributed.skip_missing_tpu(tmp_path)
        return jax.config.jax_platforms

    try:
        vendor.write_text("0x10de\n")
        assert chosen() == "cpu" and chosen("tpu") == "tpu"
        vendor.write_text("0x1ae0\n")
        assert chosen() == ""
        vendor.write_text("0x10de\n")
        modules["jax_cuda12_plugin"] = None
        assert chosen() == ""
    finally:
        jax.config.update("jax_platforms", before)
