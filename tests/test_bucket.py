"""Runs and caches in a bucket, which objects in memory stand in for, Orbax's checkpoints too."""

import fake_gcs
import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fake_gcs import FakeBucket
from orbax.checkpoint._src.path import gcs_utils

from dopsd_jax import encode as encode_lib
from dopsd_jax import export as export_lib
from dopsd_jax import train as train_lib
from dopsd_jax.core import mirror
from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.core.metrics import read_metrics
from dopsd_jax.run import loop, loras
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.pipeline import load_pipeline

RUN = "gs://bucket/runs/a"


@pytest.fixture(scope="module")
def bucket():
    """Every gs:// of this module, also that of tensorstore, which Orbax writes arrays with."""
    server = fake_gcs.serve()
    with pytest.MonkeyPatch.context() as context:
        context.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        context.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        # Orbax asks google-cloud-storage of what kind a bucket is: of the usual one.
        context.setattr(gcs_utils, "get_bucket", lambda name: object())
        fsspec.register_implementation("gcs", FakeBucket, clobber=True)
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield
    backend.fsspec_backend._get_filesystem.cache_clear()
    server.shutdown()


@pytest.fixture
def machine(bucket, tmp_path, monkeypatch):
    """A machine that has seen nothing of the bucket yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def ran(bucket, make_short_run, tmp_path_factory):
    """The objects of a finished run."""
    FakeBucket.store.clear()
    with pytest.MonkeyPatch.context() as context:
        context.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("first")))
        train_lib.train(make_short_run(), RUN)
    return {name: file.getvalue() for name, file in FakeBucket.store.items()}


@pytest.fixture
def run(ran, machine):
    """The bucket as that run left it."""
    FakeBucket.store.clear()
    for name, content in ran.items():
        FakeBucket().pipe_file(name, content)


@pytest.fixture
def empty(machine):
    FakeBucket.store.clear()
    FakeBucket.pseudo_dirs[:] = [""]


def stored():
    return {name.removeprefix("/bucket/runs/a/") for name in FakeBucket.store}


def numbers(workdir):
    return [{k: v for k, v in row.items() if k != "images_per_second"}
            for row in read_metrics(workdir)]


def test_a_run_leaves_its_files_in_the_bucket(run):
    assert {"config.json", "identity.json", "metrics.jsonl", "curves.png", "gauges.jsonl",
            "samples/step_000002.png", "best.json", "checkpoints/2/commit_success.txt",
            "checkpoints/2/state/manifest.ocdbt"} <= stored()
    assert any(name.startswith("tensorboard/") for name in stored())
    assert not {".lock", ".remote"} & stored()


def test_a_finished_run_says_so_on_another_machine(run, short_run):
    assert loop.finished(short_run, mirror.local_copy(RUN))
    assert train_lib.train(short_run, RUN) is None


def test_a_run_of_another_config_is_refused(run, short_run):
    short_run.learning_rate = 1e-3
    with pytest.raises(ValueError, match="holds a run of another config"):
        train_lib.train(short_run, RUN)


def test_other_commands_read_a_run(run, tiny, tmp_path):
    export_lib.export(RUN, "diffusers", str(tmp_path / "lora.safetensors"))
    pipe = load_pipeline(tiny.pipeline, dtype="float32", parts=())
    (tree, scale), (file, other) = (
        loras.read_lora(path, pipe) for path in (RUN, tmp_path / "lora.safetensors")
    )
    assert scale == other
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), tree, file)


def test_another_machine_goes_on(run, short_run, tmp_path):
    short_run.num_train_steps = 4
    train_lib.train(short_run, RUN)
    train_lib.train(short_run, tmp_path / "local")
    assert {"samples/step_000002.png", "samples/step_000004.png"} <= stored()
    found = numbers(mirror.local_copy(RUN))
    assert len(found) == 4 and found == numbers(tmp_path / "local")


def test_a_save_cut_off_in_the_bucket_does_not_count_and_is_made_again(run, short_run, tmp_path):
    for name in list(FakeBucket.store):
        if name.endswith("commit_success.txt"):
            del FakeBucket.store[name]
    assert workdir_lib.saved_steps(mirror.local_copy(RUN)) == []
    short_run.num_train_steps = 4
    train_lib.train(short_run, RUN)
    assert workdir_lib.saved_steps(mirror.local_copy(RUN)) == [2, 4]
    train_lib.train(short_run, tmp_path / "local")
    assert numbers(mirror.local_copy(RUN)) == numbers(tmp_path / "local")


def test_numbers_are_sent_when_a_run_stops_with_an_error(empty, short_run, monkeypatch):
    short_run.update({"num_train_steps": 3, "checkpoint_every": 1, "sample_every": 0})

    def broken(self, step, state, meta):
        if step == 2:
            raise ValueError("disk full")
        save(self, step, state, meta)

    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", broken)
    with pytest.raises(ValueError, match="disk full"):
        train_lib.train(short_run, "gs://bucket/runs/b")
    text = FakeBucket.store["/bucket/runs/b/metrics.jsonl"].getvalue().decode()
    assert text.count('"loss"') == 2


def test_a_copy_follows_what_is_in_the_bucket(empty):
    remote = epath.Path(RUN)
    (remote / "samples").mkdir(parents=True)
    (remote / "samples" / "a.png").write_bytes(b"one")
    local = mirror.local_copy(RUN + "/")
    assert (local / "samples" / "a.png").read_bytes() == b"one" and local.name == "a"
    (remote / "samples" / "a.png").unlink()
    (remote / "b").write_text("two")
    (local / "left.txt").write_text("over")
    mirror.local_copy(RUN)
    assert {p.name for p in local.rglob("*") if p.is_file()} == {"b", mirror.REMOTE}


def test_files_are_sent_once_and_not_too_often(empty):
    local = mirror.local_copy(RUN)
    sender = mirror.mirror_of(local)
    (local / "a").write_text("one")
    sender.push()
    assert stored() == set()  # not yet time
    sender.push(now=True)
    assert stored() == {"a"}
    FakeBucket.store.clear()
    sender.push(now=True)
    assert stored() == set()
    (local / "a").write_text("another")
    sender.push(now=True)
    assert stored() == {"a"}


def test_a_cache_in_a_bucket_gives_the_same_run(run, short_run, tmp_path):
    short_run.cache = "gs://bucket/cache"
    made, total = encode_lib.encode(short_run)
    assert made == total > 0 and encode_lib.encode(short_run) == (0, total)
    train_lib.train(short_run, tmp_path / "cached")
    states = []
    for directory in (mirror.checkpoints_of(RUN), tmp_path / "cached" / "checkpoints"):
        checkpoints = Checkpoints(directory, read_only=True)
        states.append(checkpoints.restore_part(("student",), 2))
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, *states)
