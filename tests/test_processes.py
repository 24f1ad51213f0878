"""Training in several processes: real ones, over loopback, against one process."""

import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs import tiny as tiny_config
from dopsd_jax import encode as encode_lib
from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.core.metrics import read_metrics
from tests import commands

DEVICES = 4
SETTINGS = {
    "buckets": "64x64", "batch_size": 4, "num_train_steps": 4, "checkpoint_every": 2,
    "log_every": 1, "sample_every": 4, "sample_steps": 2, "text_tokens": 64, "teacher_tokens": 64,
    "vlm_min_pixels": 64 * 64, "vlm_max_pixels": 64 * 64, "small_buckets": "error",
}


class Run:
    """Commands that train together: `count` processes that share DEVICES CPU devices."""

    def __init__(self, settings, workdir, count, module="train", **more):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        args = ["--config", "configs/tiny.py", *(["--workdir", workdir] if workdir else []),
                *(f"--config.{k}={v}" for k, v in {**settings, **more}.items())]
        flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
        self.processes = []
        for i in range(count):
            together = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                        "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
            self.processes.append(commands.Child(
                f"dopsd_jax.{module}", *args, XLA_FLAGS=flags, **(together if count > 1 else {})
            ))

    def end(self, code=0):
        """Waits; the output of each process."""
        try:
            outputs = ["".join(p.communicate(timeout=1800)) for p in self.processes]
        finally:
            self.kill()
        assert [p.returncode for p in self.processes] == [code] * len(self.processes), outputs
        return outputs

    def kill(self):
        for process in self.processes:
            process.kill()


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory):
    """Data for four devices, and its contexts in a cache."""
    photos = tmp_path_factory.mktemp("photos")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"a photo of {i}")
    settings = {**SETTINGS, "model": tiny.pipeline, "vlm": tiny.vlm, "data": photos,
                "cache": tmp_path_factory.mktemp("cache")}
    c = tiny_config.get_config()
    c.update({k: str(v) if isinstance(v, Path) else v for k, v in settings.items()})
    encode_lib.encode(c)
    return settings


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "one"
    return workdir, Run(settings, workdir, 1).end()


@pytest.fixture(scope="module")
def two(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "two"
    return workdir, Run(settings, workdir, 2).end()


def numbers(workdir):
    return {k: np.array([r[k] for r in read_metrics(workdir)])
            for k in ("step", "loss", "step_loss", "grad_norm")}


def assert_same_numbers(a, b, rtol=1e-6):
    a, b = numbers(a), numbers(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, err_msg=name)
    return a


def last_state(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    state = checkpoints.restore_part(("student", "teacher", "opt_state", "step"))
    checkpoints.close()
    return jax.tree.leaves(state)


def test_two_processes_take_the_steps_of_one(one, two):
    assert list(assert_same_numbers(one[0], two[0])["step"]) == [1, 2, 3, 4]
    # Looser: Adam divides small gradients, rounding and all, by their size.
    for a, b in zip(last_state(one[0]), last_state(two[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_only_the_first_process_talks_and_draws(one, two):
    first, second = two[1]
    assert "step 4/4" in first and "process 0 of 2, 2 of 4 devices" in first
    assert "step" not in second.replace("--xla", "") and str(two[0]) not in second
    assert {p.name for p in (one[0] / "samples").iterdir()} == {
        p.name for p in (two[0] / "samples").iterdir()}
    for picture in (one[0] / "samples").glob("*.png"):
        a, b = (np.asarray(Image.open(w[0] / "samples" / picture.name), int) for w in (one, two))
        assert np.abs(a - b).max() <= 1
    assert len(read_metrics(two[0])) == 4 and (two[0] / "curves.png").is_file()


def test_runs_continue_with_another_number_of_processes(settings, one, two, tmp_path):
    """Saved by two and restored by one, and the other way round: still the same steps."""
    for before, after in ((two, 1), (one, 2)):
        workdir = tmp_path / str(after)
        shutil.copytree(before[0], workdir)
        output, *_ = Run(settings, workdir, after, num_train_steps=6, sample_every=0).end()
        assert "resumed at step 4 of 6" in output
    same = assert_same_numbers(tmp_path / "1", tmp_path / "2", rtol=1e-5)
    assert list(same["step"]) == [1, 2, 3, 4, 5, 6]


def wait_for(condition, run, timeout=1800):
    end = time.time() + timeout
    while not condition():
        if time.time() > end or any(p.poll() is not None for p in run.processes):
            run.kill()
            raise AssertionError(run.processes[0].printed())
        time.sleep(0.01)


def test_sigterm_to_one_process_stops_all_at_the_same_step(settings, tmp_path):
    run = Run(settings, tmp_path, 2, num_train_steps=2000, checkpoint_every=2000, sample_every=0)
    wait_for(lambda: len(read_metrics(tmp_path)) >= 3, run)
    run.processes[1].send_signal(signal.SIGTERM)
    first, _ = run.end()
    (step,) = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert f"stopped with another process: saved step {step};" in first
    assert len(read_metrics(tmp_path)) == step


def test_a_killed_run_ends_where_an_uninterrupted_one_ends(settings, two, tmp_path):
    run = Run(settings, tmp_path, 2, sample_every=0)
    wait_for(lambda: len(read_metrics(tmp_path)) >= 2, run)
    run.processes[1].kill()
    time.sleep(0.2)
    run.processes[0].kill()  # as Slurm and XPK do once one has failed
    for process in run.processes:
        process.communicate()
    Run(settings, tmp_path, 2, sample_every=0).end()
    assert_same_numbers(tmp_path, two[0], rtol=0)
    for a, b in zip(last_state(tmp_path), last_state(two[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_the_first_process_refuses_ends_all(settings, two):
    outputs = Run(settings, two[0], 2, num_train_steps=6, learning_rate=0.5).end(1)
    for output in outputs:
        assert "error: " in output and "learning_rate: the run has 0.001, now 0.5" in output
        assert "Traceback" not in output


def test_processes_share_the_encoding(settings, tmp_path):
    from dopsd_jax.data.cache import Cache

    outputs = Run(settings, None, 2, "encode", cache=tmp_path / "cache").end()
    assert all("\n5 entries made, 0 were there" in f"\n{output}" for output in outputs)
    old, new = Cache(str(settings["cache"])), Cache(tmp_path / "cache")
    assert set(new) == set(old) and len(list((tmp_path / "cache").iterdir())) == 4
    for key in old:
        np.testing.assert_allclose(new[key], old[key], rtol=1e-5, atol=1e-5)
