"""How processes are named and refused; where a batch's rows lie. Real ones: test_processes.py."""

import os
import socket
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


LATE = """
import sys, time
import jax, numpy as np
from absl import flags
from dopsd_jax.core import distributed, sharding

delay, distributed.WAIT_S = float(sys.argv[1]), int(sys.argv[2])
distributed.define_flags()
flags.FLAGS(["late"])
late = int(distributed.os.environ["JAX_PROCESS_ID"])

def sleeps_before(call):
    def wrapped(*args):
        time.sleep(late * delay)
        return call(*args)
    return wrapped

distributed.meet = sleeps_before(distributed.meet)  # as if it compiled that long
try:
    distributed.initialize()
    mesh = sharding.make_mesh(2, 2, 1)
    distributed.connect(mesh)
except Exception as e:
    print("failed:", e, flush=True)
    distributed.os._exit(1)
for axes in (("data",), ("fsdp",), ("data", "fsdp")):
    spec = jax.sharding.PartitionSpec(("data", "fsdp"))
    ones = jax.make_array_from_callback(
        (4,), jax.sharding.NamedSharding(mesh, spec), lambda _: np.ones(1))
    add = jax.shard_map(lambda x: jax.lax.psum(x, axes), mesh=mesh, in_specs=spec,
                        out_specs=spec, check_vma=False)
    compiled = jax.jit(add).lower(ones).compile()
    time.sleep(late * delay)
    print(*(float(x.data[0]) for x in compiled(ones).addressable_shards))
"""


def two_of_which_one_is_late(delay, wait):
    """Exit status and output of two processes; the second sleeps `delay` s before each meeting."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, str(delay), str(wait)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(
                os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu",
                XLA_FLAGS="--xla_force_host_platform_device_count=2",
                JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(i)),
        ) for i in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=900)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [p.returncode for p in processes], outputs


def assert_all_summed(codes, outputs):
    assert codes == [0, 0], outputs
    for output in outputs:
        assert "2.0 2.0\n2.0 2.0\n4.0 4.0\n" in output.replace("\r", "")


def test_processes_wait_for_a_late_one_as_long_as_they_are_told_to():
    assert_all_summed(*two_of_which_one_is_late(delay=1, wait=300))


def test_the_wait_for_a_late_process_is_the_one_that_is_stated():
    """With another constant the first process gives up, so the constant is what decides."""
    codes, outputs = two_of_which_one_is_late(delay=12, wait=6)
    assert codes[0] == 1 and "failed: " in outputs[0], outputs
    assert "DEADLINE_EXCEEDED" in outputs[0] or "timed out" in outputs[0]
    assert distributed.WAIT_S >= 3600


@pytest.mark.slow
def test_a_process_may_be_later_than_gloo_waits():
    """Gloo gives up 30 seconds after the first process has called for a connection."""
    assert_all_summed(*two_of_which_one_is_late(delay=65, wait=3600))


def test_every_meeting_has_a_name_of_its_own(monkeypatch):
    class Client:
        def wait_at_barrier(self, name, milliseconds):
            waits.append((name, milliseconds))

    waits = []
    monkeypatch.setattr(distributed, "global_state", type("State", (), {"client": Client()}))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for _ in range(2):
        distributed.meet("data")
    assert len({name for name, _ in waits}) == 2
    assert {milliseconds for _, milliseconds in waits} == {distributed.WAIT_S * 1000}
