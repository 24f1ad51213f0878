"""What Weights & Biases and Trackio hold of a run that is killed and continued, read from their own
files; and that a tracker that fails stops nothing."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dopsd_jax.core import trackers
from dopsd_jax.core.metrics import GAUGES, Metrics, read_metrics
from tests.commands import ROOT, environment

GROUPS = ("train/", "gauges/")
PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def child(workdir, kill_at):
    """Trains the toy of test_loop with both trackers; dies once W&B runs and Trackio has a
    step's numbers."""
    from test_loop import make_config, make_task

    from dopsd_jax.run import loop

    def scalars(self, step, values, call=Metrics.scalars):
        call(self, step, values)
        if step == kill_at:
            from trackio.sqlite_storage import SQLiteStorage

            while not (Path(workdir) / "wandb.json").is_file() or trackers._held(
                    SQLiteStorage.get_logs("ours", known())).get("train") != step:
                assert all(tracker.is_alive() for tracker in self._trackers)
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)

    def known():
        file = Path(workdir) / "trackio.json"
        return json.loads(file.read_text())["run"] if file.is_file() else ""

    def preview(step, state, metrics):
        pixels = np.full((8, 8, 3), step, np.uint8)
        (Path(workdir) / "samples").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(Path(workdir) / "samples" / f"step_{step:06d}.png")
        metrics.image(step, "step", pixels)
        metrics.gauges(step, {"style": float(state.w)})

    Metrics.scalars = scalars
    task = make_task(preview=preview)
    task.trackers = ("wandb", "trackio")
    loop.run(make_config(sample_every=2), workdir, task)


def start(workdir, kill_at=0, **variables):
    env = environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'run'}"}
    env = {k: v for k, v in env.items() if not k.startswith(("WANDB_", "TRACKIO_"))}
    return subprocess.run(
        [sys.executable, __file__, str(workdir), str(kill_at)], capture_output=True, text=True,
        check=False, env=env | {"TRACKIO_DIR": str(workdir.parent / "trackio")} | variables,
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed at step 5, after the checkpoint of step 4, and continued to its end."""
    workdir = tmp_path_factory.mktemp("trackers") / "my run"
    names = {"WANDB_MODE": "offline", "WANDB_PROJECT": "ours", "TRACKIO_PROJECT": "ours"}
    first = start(workdir, 5, **names)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert [r["step"] for r in read_metrics(workdir)] == [1, 2, 3, 4, 5]
    ids = {name: (workdir / f"{name}.json").read_text() for name in trackers.TRACKERS}
    done = start(workdir, **names)
    assert done.returncode == 0 and "goes on without it" not in done.stderr, done.stderr
    return workdir, {name: json.loads(text)["run"] for name, text in ids.items()}


def expected(workdir):
    """(step, tag) -> value, of the run's own files."""
    rows = {}
    for group, file in (("train", "metrics.jsonl"), ("gauges", GAUGES)):
        for row in read_metrics(workdir, file):
            step = row.pop("step")
            for name, value in row.items():
                values = {f"/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {
                    "": value}
                rows |= {(step, f"{group}/{name}{i}"): x for i, x in values.items()}
    assert {s for s, tag in rows if tag == "train/loss"} == {1, 2, 3, 4, 5, 6}
    assert {s for s, tag in rows if tag == "gauges/style"} == {0, 2, 4, 6}
    # Where a step that was done twice stands as it was sent first, its rate is not the file's.
    return {key: x for key, x in rows.items() if key[1] != "train/images_per_second"}


def once(found):
    """[(step, tag, value)] -> {(step, tag): value}, each there once."""
    assert len({f[:2] for f in found}) == len(found)
    return {(s, tag): x for s, tag, x in found if tag != "train/images_per_second"}


def records(file):
    """The records of a .wandb file: LevelDB's log format in blocks of 32 KiB, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_wandb_has_every_step_once_in_one_file(killed):
    workdir, ids = killed
    (folder,) = (workdir / "wandb").glob("offline-run-*")
    assert folder.name.endswith(ids["wandb"])
    assert len(list((workdir / "wandb" / "earlier").iterdir())) == 1  # of the killed start
    found, pictures, runs = [], {}, []
    for record in records(folder / f"run-{ids['wandb']}.wandb"):
        if record.HasField("run"):
            runs.append(record.run)
        if record.HasField("history"):
            row = {".".join(item.nested_key): json.loads(item.value_json)
                   for item in record.history.item}
            assert row["step"] == row["_step"]
            found += [(row["step"], k, v) for k, v in row.items() if k.startswith(GROUPS)]
            if "pictures/step.path" in row:
                pictures[row["step"]] = row["pictures/step.path"]
    assert once(found) == pytest.approx(expected(workdir))
    assert {s: np.asarray(Image.open(folder / "files" / p)).max() for s, p in pictures.items()} \
        == {0: 0, 2: 2, 4: 4, 6: 6}
    assert len(pictures) == 4
    (run,) = runs
    assert (run.run_id, run.project, run.display_name) == (ids["wandb"], "ours", "my run")
    given = {item.key: json.loads(item.value_json)
             for item in run.config.update}
    assert given["num_train_steps"] == 6 and given["sample_every"] == 2


def test_trackio_has_every_step_once_in_its_database(killed):
    workdir, ids = killed
    assert ids["trackio"].startswith("my-run-")
    code = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage as S
(run,) = trackio.Api().runs("ours")
print(json.dumps([run.name, run.config, S.get_logs("ours", run.name, run_id=run.id)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=environment() | {"TRACKIO_DIR": str(workdir.parent / "trackio")})
    name, config, rows = json.loads(done.stdout)
    assert name == ids["trackio"]
    assert config["num_train_steps"] == 6 and config["sample_every"] == 2
    found = [(r["step"], k, v) for r in rows for k, v in r.items() if k.startswith(GROUPS)]
    assert once(found) == pytest.approx(expected(workdir))
    media = workdir.parent / "trackio" / "media"
    pictures = [(r["step"], r["pictures/step"]["file_path"]) for r in rows if "pictures/step" in r]
    assert {s: np.asarray(Image.open(media / p).convert("RGB")).max() for s, p in pictures} \
        == {0: 0, 2: 2, 4: 4, 6: 6}
    assert len(pictures) == 4


def test_a_run_ends_well_where_both_trackers_fail(tmp_path):
    (tmp_path / "trackio").write_text("a file where the database should be")
    done = start(tmp_path / "run", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("goes on without it") == 2, done.stderr
    assert "not logged in; run `wandb login` once, or set WANDB_MODE=offline" in done.stderr
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / "wandb.json").exists()


class Server:
    """Stands for a tracker that cannot tell what it has, as W&B on its server; keeps what comes."""

    held = None
    sent: list

    def __init__(self, workdir, known, settings):
        self.id = known or "new"
        self.sent.append((self.id, settings))

    def log(self, event):
        self.sent.append((event.group, event.step, sorted(event.pictures)))

    def close(self, failed):
        self.sent.append(failed)


@pytest.fixture
def server(monkeypatch):
    target = type("Fake", (Server,), {"sent": []})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", target)
    return target


def steps(metrics, *numbers):
    for step in numbers:
        metrics.scalars(step, {"loss": 1.0})
        if step % 2 == 0:
            metrics.image(step, "grid", PIXELS)
            metrics.gauges(step, {"style": 1.0})


def test_what_stands_on_a_server_is_not_sent_again(server, tmp_path):
    for resume, numbers in ((0, (1, 2, 3, 4, 5)), (2, (3,)), (2, (3, 4, 5, 6))):
        metrics = Metrics(tmp_path, resume, trackers=["wandb"], settings={"seed": 1})
        steps(metrics, *numbers)
        metrics.close(failed=len(numbers) == 4)
    assert server.sent == [
        ("new", {"seed": 1}), ("train", 1, []), ("train", 2, []), ("gauges", 2, ["grid"]),
        ("train", 3, []), ("train", 4, []), ("gauges", 4, ["grid"]), ("train", 5, []), False,
        ("new", {"seed": 1}), False,
        ("new", {"seed": 1}), ("train", 6, []), ("gauges", 6, ["grid"]), True,
    ]


def test_a_tracker_that_comes_later_gets_what_was(server, tmp_path):
    metrics = Metrics(tmp_path, 0)
    steps(metrics, 1, 2, 3)
    metrics.close()
    (tmp_path / "samples").mkdir()
    for name in ("grid_000002", "prompts_000002", "grid_000012"):
        Image.fromarray(PIXELS).save(tmp_path / "samples" / f"{name}.png")
    metrics = Metrics(tmp_path, 2, trackers=["wandb"])
    steps(metrics, 3)
    metrics.close()
    assert server.sent[1:-1] == [
        ("train", 1, []), ("train", 2, []), ("gauges", 2, ["grid", "prompts"]), ("train", 3, [])]


def lines_of(word, caplog):
    """Log lines with a word."""
    return [line for line in caplog.messages if word in line]


@pytest.mark.parametrize("moment", ["import", "__init__", "log", "close"])
def test_what_goes_wrong_is_said_once(server, tmp_path, monkeypatch, caplog, moment):
    def fail(*args):
        raise RuntimeError("no network")

    monkeypatch.setattr(*(
        (trackers.importlib, "import_module") if moment == "import" else (server, moment)), fail)
    metrics = Metrics(tmp_path, 0, trackers=["wandb"])
    steps(metrics, 1, 2, 3, 4)
    metrics.close()
    (said,) = lines_of("wandb", caplog)
    assert said.startswith("wandb: RuntimeError: no network; this run goes on without it")
    assert len(read_metrics(tmp_path)) == 4


def test_a_tracker_that_hangs_is_left_behind(server, tmp_path, monkeypatch, caplog):
    release = trackers.threading.Event()
    monkeypatch.setattr(server, "log", lambda *args: release.wait())
    monkeypatch.setattr(trackers, "CLOSE_S", 0.1)
    metrics = Metrics(tmp_path, 0, trackers=["wandb"])
    steps(metrics, 1, 2)
    metrics.close()
    release.set()
    (said,) = lines_of("wandb", caplog)
    assert "has not taken everything within 0.1 seconds" in said


def test_names_and_packages_are_checked(monkeypatch):
    for text in ("tensorboard", "wandb,", "wandb,wandb", "wandb, trackio"):
        with pytest.raises(ValueError, match="expected wandb or trackio, or both as wandb,trackio"):
            trackers.parse(text)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"trackio is not installed; run: pip install "
                                         r"'dopsd_jax\[trackio\]'"):
        trackers.check_installed("trackio")


if __name__ == "__main__":
    child(Path(sys.argv[1]), int(sys.argv[2]))
