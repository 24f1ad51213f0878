"""The training command on the tiny pipeline: artefacts, resume, signals, refusals."""

import contextlib
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import tiny as tiny_config
from dopsd_jax import train as train_lib
from dopsd_jax.core import trees
from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.core.metrics import read_metrics
from dopsd_jax.run import loop, previews
from dopsd_jax.run import step as step_lib
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights import WeightsError
from tests import commands
from tests.commands import environment

ROOT = Path(__file__).parents[1]
STEPS = 30  # enough that a signal sent after the first finds the run still going


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    directory = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(getattr(photographs, name)()).save(directory / f"{name}.png")
        (directory / f"{name}.txt").write_text(f"a photo of {name}")
    return directory


OVERRIDES = {
    "buckets": "64x64,96x64", "num_train_steps": STEPS, "checkpoint_every": 10, "sample_every": 0,
    "teacher_tokens": 96, "text_tokens": 64, "log_every": 1, "sample_steps": 2,
    "vlm_min_pixels": 128 * 128, "vlm_max_pixels": 128 * 128, "num_steps": 2,
}


@pytest.fixture
def config(tiny, photos):
    c = tiny_config.get_config()
    c.model, c.vlm, c.data = str(tiny.pipeline), str(tiny.vlm), str(photos)
    c.update(OVERRIDES)
    return c


def flags(tiny, photos, workdir, **more):
    """Of the command."""
    values = {"model": tiny.pipeline, "vlm": tiny.vlm, "data": photos, **OVERRIDES, **more}
    return ["--config", "configs/tiny.py", "--workdir", str(workdir),
            *(f"--config.{k}={v}" for k, v in values.items())]


def from_the_shell(*args, **variables):
    """Status and output of Python in a process of its own."""
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment(**variables), text=True, timeout=1800,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )
    return done.returncode, done.stdout


def wait_for(process, condition, timeout=1800):
    end = time.time() + timeout
    while not condition():
        assert process.poll() is None, process.printed()
        assert time.time() < end, "timed out"
        time.sleep(0.01)


def final_state(workdir):
    """Student, teacher and optimizer of the last step, and the losses of all steps."""
    checkpoints = Checkpoints(Path(workdir) / "checkpoints")
    state = checkpoints.restore_part(("student", "teacher", "opt_state", "step"), STEPS)
    checkpoints.close()
    return state, [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(workdir)]


def assert_same(one, two):
    (state1, losses1), (state2, losses2) = one, two
    assert losses1 == losses2 and len(losses1) == STEPS
    for a, b in zip(jax.tree.leaves(state1), jax.tree.leaves(state2), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def uninterrupted(tiny, photos, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    code, output = from_the_shell(
        "-m", "dopsd_jax.train",
        *flags(tiny, photos, workdir, sample_every=15, sample_prompts="('a fox','two dogs')",
               trackers="trackio"),
        TRACKIO_DIR=str(workdir.parent / "trackio"),
    )
    assert code == 0, output
    return workdir, output


def test_a_run_leaves_pictures_curves_numbers_and_checkpoints(uninterrupted):
    workdir, output = uninterrupted
    for step in (0, 15, 30):
        for name in ("step", "trajectory", "prompts"):
            picture = np.asarray(Image.open(workdir / "samples" / f"{name}_{step:06d}.png"))
            assert picture.std() > 5
    assert Image.open(workdir / "curves.png").size[0] > 500
    board = EventAccumulator(str(workdir / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert set(board.Tags()["images"]) == {"step", "trajectory", "prompts"}
    rows = read_metrics(workdir)
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    assert {"loss", "grad_norm", "step_loss"} <= set(rows[0])
    assert "images_per_second" not in rows[0] and rows[-1]["images_per_second"] > 0
    assert np.mean(rows[0]["step_loss"]) == pytest.approx(rows[0]["loss"], rel=1e-5)
    assert "46 of 46 language tensors" in output and "images/s" in output and "left" in output
    config = json.loads((workdir / "config.json").read_text())
    assert config["lora"]["rank"] == 8


def test_a_tracker_has_the_numbers_the_pictures_and_the_config(uninterrupted):
    directory = uninterrupted[0].parent / "trackio"
    with contextlib.closing(sqlite3.connect(directory / "dopsd_jax.db")) as database:
        rows = database.execute("select step, metrics from metrics").fetchall()
        ((config,),) = database.execute("select config from configs").fetchall()
    rows = [(step, json.loads(values)) for step, values in rows]
    assert [s for s, row in rows if "train/loss" in row] == [*range(1, STEPS + 1)]
    drawn = {s: row for s, row in rows if "gauges/style" in row}
    assert [*drawn] == [0, 15, 30]
    for row in drawn.values():
        for name in ("step", "trajectory", "prompts"):
            file = directory / "media" / row[f"pictures/{name}"]["file_path"]
            assert Image.open(file).size[0] > 64
    assert json.loads(config)["lora.rank"] == 8


def test_the_student_has_moved_and_the_teacher_follows(uninterrupted):
    student, _ = workdir_lib.read_lora(uninterrupted[0])
    teacher, spec = workdir_lib.read_lora(uninterrupted[0], role="teacher")
    assert (spec.rank, spec.alpha) == (8, 16.0)
    b = {n: x for n, x in trees.flatten(student).items() if n.endswith("/b")}
    assert b and all(np.abs(x).max() > 0 for x in b.values())
    for name, x in b.items():
        ratio = np.linalg.norm(trees.flatten(teacher)[name]) / np.linalg.norm(x)
        assert 0 < ratio < 0.3  # decay 0.99 over thirty steps


def test_reading_a_lora_leaves_an_unfinished_save_alone(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    unfinished = tmp_path / "run" / "checkpoints" / "40.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "30", unfinished)
    workdir_lib.read_lora(tmp_path / "run")
    assert unfinished.is_dir()


def test_killed_stopped_and_resumed_equals_uninterrupted(tiny, photos, uninterrupted, tmp_path):
    """One run killed before its first save, stopped, killed during a save, and killed late."""
    workdir = tmp_path / "run"
    command = ("dopsd_jax.train", *flags(tiny, photos, workdir))
    seldom = ("dopsd_jax.train", *flags(tiny, photos, workdir, checkpoint_every=1000))

    def interrupt(command, how, when):
        process = commands.Child(*command)
        wait_for(process, when)
        process.send_signal(how)
        output = "".join(process.communicate(timeout=1800))
        return process.returncode, output

    def has_saved():
        return [p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]

    killed = -signal.SIGKILL
    assert interrupt(seldom, signal.SIGKILL, lambda: read_metrics(workdir))[0] == killed
    assert not has_saved()
    seen = len(read_metrics(workdir))
    code, output = interrupt(seldom, signal.SIGTERM, lambda: len(read_metrics(workdir)) > seen)
    assert code == 0 and "SIGTERM: saved step" in output, output
    (saved,) = has_saved()
    code, output = interrupt(command, signal.SIGKILL, lambda: any(
        "tmp" in p.name for p in (workdir / "checkpoints").glob("*")
    ))
    assert code == killed and f"resumed at step {saved.name}" in output, output
    late = max(22, len(read_metrics(workdir)) + 1)
    code, _ = interrupt(command, signal.SIGKILL, lambda: len(read_metrics(workdir)) >= late)
    assert code == killed
    done = commands.run(*command)
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    assert_same(final_state(workdir), final_state(uninterrupted[0]))


@pytest.fixture(scope="module")
def second(tiny, photos, uninterrupted, tmp_path_factory):
    """What a second run prints: same config, other files; then the modules that it imported."""
    workdir = tmp_path_factory.mktemp("second") / "run"
    script = (
        "import sys; from dopsd_jax import train; train.define_flags()\n"
        f"sys.argv = ['train', *{flags(tiny, photos, workdir)!r}]\n"
        "try: train.cli.run_command(train.main)\n"
        "except SystemExit as e: assert not e.code, e\n"
        "print('imported:', *sorted(m for m in sys.modules if '.' not in m))"
    )
    code, output = from_the_shell("-c", script, JAX_DEBUG_LOG_MODULES="jax._src.compiler")
    assert code == 0, output
    return output


def test_a_second_run_compiles_nothing(second):
    taken = re.findall(r"Persistent compilation cache hit for '(\w+)'", second)
    assert "jit_train_step" in taken and len(taken) > 20
    assert "PERSISTENT COMPILATION CACHE MISS" not in second


def test_training_imports_neither_torch_nor_tensorflow(second):
    imported = set(re.search("^imported: (.*)$", second, re.MULTILINE)[1].split())
    assert {"jax", "dopsd_jax"} <= imported
    assert not {"torch", "tensorflow", "diffusers", "peft"} & imported


def test_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    config, tmp_path, monkeypatch
):
    made = step_lib.make_train_step

    def poisoned(*args):
        step_fn = made(*args)

        def train_step(state, base, batch):
            bad = jax.numpy.where(state.step == 3, np.nan, 1.0)
            return step_fn(state, base, batch.replace(noise=batch.noise * bad))

        return train_step

    monkeypatch.setattr(step_lib, "make_train_step", poisoned)
    config.update({"checkpoint_every": 2, "buckets": "64x64"})
    with pytest.raises(loop.TrainingError, match=r"step 4: loss = nan.*checkpoint of step 2"):
        train_lib.train(config, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.all_steps() == [2]
    tree = checkpoints.restore_part(("student",))
    checkpoints.close()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def test_a_workdir_of_another_config_is_refused(config, uninterrupted):
    config.learning_rate = 5e-4
    config.lora.rank = 4
    with pytest.raises(ValueError, match=r"another config(.|\n)*learning_rate: the run has 0.001, "
                                         r"now 0.0005(.|\n)*lora.rank: the run has 8, now 4"):
        train_lib.train(config, uninterrupted[0])


def test_a_workdir_of_other_weights_is_refused(config, uninterrupted, tmp_path):
    shutil.copytree(config.model, tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text() + "\n")
    config.model = str(tmp_path / "model")
    with pytest.raises(ValueError, match=r"contents of model: the run has"):
        train_lib.train(config, uninterrupted[0])


def test_a_workdir_of_other_data_is_refused(config, photos, uninterrupted, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "coffee.txt").write_text("tea")
    config.data = str(tmp_path / "photos")
    with pytest.raises(ValueError, match="contents of data: the run has"):
        train_lib.train(config, uninterrupted[0])


def test_a_checkpoint_of_another_rank_is_refused(config, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text().replace('"rank": 8', '"rank": 4'))
    config.update({"sample_every": 15, "sample_prompts": ("a fox", "two dogs")})
    config.lora.rank, config.num_train_steps = 4, STEPS + 1
    with pytest.raises(ValueError, match="another model, rank or optimizer.*expected .*got"):
        train_lib.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    "changes,message",
    [({"model": ""}, "model: expected a path"),
     ({"model": "nowhere"}, "nowhere"),
     ({"data": "nowhere"}, "nowhere"),
     ({"small_buckets": "error"}, "batch_size"),
     ({"recipe": "edit"}, "recipe: edit shows reference images, which this model does not take; "
                        "choose one of vlm, text"),
     ({"num_steps": 0, "teacher": "old", "text_tokens": 100}, r"num_steps: expected 1 to 1000"),
     ({"text_tokens": 100}, "text_tokens: expected a multiple of 32, from 32 to 32768, got 100"),
     ({"teacher": "old"}, "teacher: expected one of .*got 'old'"),
     ({"batch_size": 3, "accumulation": 2}, "expected a multiple of accumulation = 2, got 3"),
     ({"lora.targets": "no_such"}, "'no_such' matches no parameter"),
     ({"text_tokens": 32, "teacher_tokens": 32},
      r"astronaut.png, caption, text_tokens = 32: .*at most 32 tokens[\s\S]*"
      r"astronaut.png, caption, teacher_tokens = 32: .*at most 32 tokens[\s\S]*chelsea.png"),
     ({"mesh.fsdp": 7}, "mesh: expected data x fsdp x tensor = 1 devices")],
)
def test_bad_configs_say_what_is_wrong(config, tmp_path, changes, message):
    for key, value in changes.items():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        train_lib.train(config, tmp_path)


def test_vision_tower_of_another_language_model_is_refused(config, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(config.vlm, tmp_path / "vlm")
    (file,) = (tmp_path / "vlm").glob("*.safetensors")
    tensors = load_file(file)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1]
    save_file(tensors, file, metadata={"format": "pt"})
    config.vlm = str(tmp_path / "vlm")
    with pytest.raises(WeightsError, match="layers.1.mlp.up_proj.weight"):
        train_lib.train(config, tmp_path / "run")


def test_unknown_config_key_is_refused(tiny, photos, tmp_path):
    done = commands.run("dopsd_jax.train", *flags(tiny, photos, tmp_path, learning_rat=1))
    assert done.returncode == 1 and "learning_rat" in done.stderr
    assert not (tmp_path / "config.json").exists()


def test_full_fine_tuning_runs_and_resumes(config, tmp_path):
    config.update({"trainable": "full", "num_train_steps": 2, "checkpoint_every": 1,
                   "learning_rate": 1e-4, "moments_dtype": "int8", "buckets": "64x64"})
    train_lib.train(config, tmp_path)
    config.num_train_steps = 3
    state = train_lib.train(config, tmp_path)
    assert int(state.step) == 3 and len(read_metrics(tmp_path)) == 3
    with pytest.raises(ValueError, match="it holds no LoRA"):
        workdir_lib.read_lora(tmp_path)


def test_full_fine_tuning_shows_the_base_as_the_base_after_a_resume(config, tmp_path, monkeypatch):
    grids = []
    grid = previews.grid
    monkeypatch.setattr(previews, "grid", lambda c: (grids.append(dict(c)), grid(c))[1])
    config.update({"trainable": "full", "num_train_steps": 2, "checkpoint_every": 1,
                   "learning_rate": 1e-2, "sample_every": 2, "sample_prompts": ("a fox",),
                   "buckets": "64x64"})
    train_lib.train(config, tmp_path)
    config.num_train_steps = 4
    train_lib.train(config, tmp_path)
    rows = [g for g in grids if "target" in g]
    prompts = [g for g in grids if set(g) == {"base", "student"}]
    assert len(rows) == len(prompts) == 3  # steps 0, 2, 4
    for kind in (rows, prompts):
        np.testing.assert_array_equal(kind[0]["base"], kind[0]["student"])
        for later in kind[1:]:
            np.testing.assert_array_equal(later["base"], kind[0]["base"])
            assert (later["student"] != later["base"]).any()


def test_encoders_are_gone_before_the_transformer_is_loaded(config, tmp_path, monkeypatch):
    order, held = [], []
    load, encode_all = train_lib.model.load_model, train_lib.encode_all

    def note(what):
        order.append(what)
        held.append({x.shape for x in jax.live_arrays()})

    def loading(config, **keywords):
        note(keywords["parts"])
        return load(config, **keywords)

    def encoding(*arguments):
        encode_all(*arguments)
        note("encoded")

    monkeypatch.setattr(train_lib.model, "load_model", loading)
    monkeypatch.setattr(train_lib, "encode_all", encoding)
    config.update({"num_train_steps": 1, "preflight": "off"})
    train_lib.train(config, tmp_path)
    assert order == [("text_encoder",), "encoded", ("transformer",)]
    encoder = load(config, dtype="float32", parts=("text_encoder",)).text_params
    weights = {x.shape for x in jax.tree.leaves(encoder) if x.ndim == 3}
    assert weights <= held[1] and not weights & held[2]


def test_a_finished_run_ends_before_its_weights_are_loaded(
    config, uninterrupted, monkeypatch, caplog
):
    monkeypatch.setattr(train_lib.model, "load_model", None)
    config.update({"sample_every": 15, "sample_prompts": ("a fox", "two dogs")})
    with caplog.at_level("INFO", "dopsd_jax"):
        assert train_lib.train(config, uninterrupted[0]) is None
    assert "already finished: step 30 of 30" in caplog.text


def test_a_first_start_that_failed_claims_nothing(config, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise ValueError("a broken tensor")

    with monkeypatch.context() as m, pytest.raises(ValueError, match="a broken tensor"):
        m.setattr(train_lib, "load_encoders", broken)  # after the claim
        train_lib.train(config, tmp_path)
    assert (tmp_path / "config.json").is_file()
    config.num_train_steps, config.learning_rate = 1, 5e-4
    assert int(train_lib.train(config, tmp_path).step) == 1


def test_a_workdir_of_other_pixels_is_refused(config, photos, uninterrupted, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    file = tmp_path / "photos" / "coffee.png"
    pixels = np.asarray(Image.open(file)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(file)
    config.data = str(tmp_path / "photos")
    with pytest.raises(ValueError, match="contents of data: the run has"):
        train_lib.train(config, uninterrupted[0])
