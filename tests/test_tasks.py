"""One task after another: what each stands on, what is refused, and that kills change nothing."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from dopsd_jax import report, tasks
from dopsd_jax import train as train_lib
from dopsd_jax.compare import matrix as matrix_lib
from dopsd_jax.core import trees
from dopsd_jax.core.metrics import GAUGES, read_metrics
from dopsd_jax.data.datasets import read_data
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.config import needs_of_rows
from tests.commands import ROOT, environment

RUN = """
from configs import tiny
def get_config():
    c = tiny.get_config()
    c.model, c.vlm, c.buckets = {model!r}, {vlm!r}, "64x64"
    c.text_tokens, c.teacher_tokens = 64, 64
    c.vlm_min_pixels = c.vlm_max_pixels = 64 * 64
    c.num_train_steps, c.batch_size, c.learning_rate, c.lora.rank = 3, 2, 1e-2, 4
    c.sample_every, c.sample_steps, c.sample_rows, c.checkpoint_every = 3, 2, 2, 1
    c.gauge_prompts, c.preflight, c.data = ("a lighthouse",), "off", {data!r}
    return c
"""
SEQUENCE = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({values!r})
"""


@pytest.fixture(scope="module")
def data(two_photos, tmp_path_factory):
    """Two data sets of the same pictures with other captions."""
    folder = tmp_path_factory.mktemp("tasks_data")
    for name in ("one", "two"):
        (folder / name).mkdir()
        for picture in two_photos.glob("*.png"):
            (folder / name / picture.name).write_bytes(picture.read_bytes())
            (folder / name / f"{picture.stem}.txt").write_text(f"{name} {picture.stem}")
    return folder


@pytest.fixture(scope="module")
def make(tiny, data, tmp_path_factory):
    """Changes of a sequence -> its config."""
    file = tmp_path_factory.mktemp("tasks_config") / "run.py"
    file.write_text(RUN.format(model=str(tiny.pipeline), vlm=str(tiny.vlm), data=str(data / "one")))

    def make(**changes):
        return ConfigDict({
            "run_config": str(file), "carry": "stack", "keep_earlier": False, "changes": {},
            "tasks": [{"name": "first", "data": str(data / "one")},
                      {"name": "second", "data": str(data / "two"), "lora.rank": 2}],
        } | changes)

    return make


def students(found):
    return [workdir_lib.read_lora(t.workdir)[0] for t in found]


def moved(tree, other):
    """Largest difference of two LoRAs of one rank."""
    pairs = zip(trees.flatten(tree).values(), trees.flatten(other).values(), strict=True)
    return max(np.abs(x - y).max() for x, y in pairs)


@pytest.fixture(scope="module")
def stacked(make, tmp_path_factory):
    """A finished sequence, in which nothing may be changed."""
    workdir = tmp_path_factory.mktemp("tasks") / "stacked"
    return workdir, tasks.run(make(), workdir)


def test_a_new_lora_stands_on_frozen_ones(stacked):
    _, (first, second) = stacked
    assert second.config.base_lora == str(first.workdir) and not second.config.init_lora
    assert [lora_lib.max_rank(x) for x in students((first, second))] == [4, 2]
    assert not any(r["step"] == 0 and r["drift"] == 0 for r in read_metrics(second.workdir, GAUGES))


def test_every_later_task_draws_the_earlier_ones(stacked):
    _, (first, second) = stacked
    assert second.config.earlier_data == first.config.data and not first.config.earlier_data
    rows = read_metrics(second.workdir, GAUGES)
    assert [r["step"] for r in rows] == [0, 3]
    # Before its first update the second student draws the first task's prompts as that one did.
    last = read_metrics(first.workdir, GAUGES)[-1]
    np.testing.assert_allclose(rows[0]["style_1"], last["style"], rtol=1e-3)
    assert rows[1]["style_1"] != rows[0]["style_1"]
    assert (second.workdir / "samples" / "earlier1_000003.png").is_file()


def test_the_page_shows_what_was_kept(stacked):
    workdir, (first, second) = stacked
    table = (workdir / "tasks.md").read_text()
    found = matrix_lib.of_gauges({"first": first.workdir, "second": second.workdir})
    assert np.isnan(found.values[0, 1]) and not np.isnan(found.values[1]).any()
    for value in (*found.values[1], *found.untuned, found.values[0, 0]):
        assert f"| {value:.3g} |" in table
    assert f"Backward transfer: {found.values[0, 0] - found.values[1, 0]:+.3g}" in table
    page = (workdir / "report.html").read_text()
    assert page == report.tasks_page(workdir)
    assert page.count("<h2>After task") == 2 and "prompts of first" in page


@pytest.fixture
def copied(stacked, tmp_path):
    """The workdir of such a sequence, to be changed at will."""
    return Path(shutil.copytree(stacked[0], tmp_path / "copied"))


def test_a_finished_sequence_does_nothing_and_takes_further_tasks(make, copied, data):
    workdir = copied
    assert len(tasks.run(make(), workdir)) == 2
    longer = make()
    longer.tasks = (*longer.tasks, {"name": "third", "data": str(data / "one"),
                                    "num_train_steps": 1})
    third = tasks.run(longer, workdir)[-1]
    assert third.config.base_lora == f"{workdir}/1_first,{workdir}/2_second"
    assert workdir_lib.saved_steps(third.workdir) == [1]
    history = json.loads((workdir / "tasks.json").read_text())
    assert [t["name"] for t in history["tasks"]] == ["first", "second", "third"]


def changed_tasks(make, *changes):
    config = make()
    config.tasks = tuple(dict(t) | c for t, c in zip(config.tasks, changes, strict=False))
    return config


@pytest.mark.parametrize("alter, message", [
    (lambda make, data: make(carry="adapter"), "holds tasks with carry = stack, now adapter"),
    (lambda make, data: changed_tasks(make, {"name": "second"}, {"name": "first"}),
     "task 1: was first, now second\n  task 2: was second, now first"),
    (lambda make, data: changed_tasks(make, {}), "task 2: was second, now none"),
    (lambda make, data: changed_tasks(make, {"num_train_steps": 4}, {}),
     "num_train_steps was 3, now 4, and task 2 stands on it"),
    (lambda make, data: make(tasks=(*make().tasks[:1], {
        "name": "second", "data": str(data / "two"), "lora.rank": 2, "num_train_steps": 1,
    }, {"name": "third"})), r"task 2 \(second\): 3 updates are done, now num_train_steps is 1, and "
     "task 3 would stand on it"),
    (lambda make, data: changed_tasks(make, {"data": str(data / "two")}, {}),
     "contents of data: the run has"),
    (lambda make, data: changed_tasks(make, {"learning_rate": 1.0}, {}),
     "learning_rate: the run has 0.01, now 1.0"),
])
def test_another_history_is_refused(make, data, stacked, alter, message):
    with pytest.raises(ValueError, match=message):
        tasks.run(alter(make, data), stacked[0])


def test_an_earlier_task_that_went_on_elsewhere_is_noticed(make, stacked, copied):
    """Whoever trains a task's directory on by hand has changed what the next one stands on."""
    longer = stacked[1][0].config.copy_and_resolve_references()
    longer.num_train_steps = 4
    train_lib.train(longer, copied / "1_first")
    with pytest.raises(ValueError, match="contents of base_lora: the run has"):
        tasks.run(make(), copied)


@pytest.mark.parametrize("changes, message", [
    ({"carry": "both"}, r"carry: expected one of \('adapter', 'stack', 'full'\), got 'both'"),
    ({"tasks": []}, "tasks: expected at least one, got none"),
    ({"tasks": [{"name": "a/b"}]}, "expected a name of a-z, 0-9, - and _ for task 1, got 'a/b'"),
    ({"tasks": [{"name": "a"}, {"name": "a"}]}, "tasks: expected different names, got a, a"),
    ({"tasks": [{"name": "a"}, {"name": "b", "init_lora": "x"}]},
     r"task 2 \(b\): init_lora: expected none, it follows from carry"),
    ({"tasks": [{"name": "a", "rate": 1}]}, r"task 1 \(a\): rate: no key of a run"),
    ({"changes": {"lora": {"rang": 1}}}, r"task 1 \(first\): lora.rang: no key of a run"),
    ({"changes": {"num_train_steps": "many"}}, r"task 1 \(first\): .*num_train_steps"),
    ({"changes": {"trainable": "full"}},
     r"task 1 \(first\): trainable: expected lora, as carry = stack has it, got 'full'"),
    ({"keep_earlier": True}, r"task 2 \(second\): keep_share: expected a share above 0"),
    ({"replay_share": 1.0}, r"\(first\): replay_share: expected a share in \[0, 1\), got 1.0"),
    ({"replay_share": 0.5, "tasks": [{"name": "a", "data": "x,y"}, {"name": "b"}]},
     r"task 2 \(b\): data_weights: expected those of several data sets"),
    ({"replay_share": 0.5, "tasks": [{"name": "a", "recipe": "text"}, {"name": "b"}]},
     r"task 2 \(b\): recipe: expected that of the tasks whose pictures .* text, got vlm"),
    ({"run_config": "none.py"}, "--config.run_config none.py: no such file"),
])
def test_a_bad_sequence_is_refused_before_anything_is_made(make, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tasks.run(make(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_later_task_cannot_do_is_said_before_the_first_begins(make, data, tmp_path):
    config = make(tasks=[
        {"name": "first", "data": str(data / "one")},
        {"name": "second", "data": str(tmp_path / "none"), "text_tokens": 128},
        {"name": "third", "data": str(data / "two"), "learning_rate": -1.0},
    ])
    with pytest.raises(ValueError) as caught:
        tasks.run(config, tmp_path / "run")
    assert f"task 2 (second): data: found none at {tmp_path}/none" in str(caught.value)
    assert "task 3 (third): config:\n  learning_rate: expected a number above" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("carry, kinds, message", [
    ("stack", ("dora", "lokr"), "expected lora or lokr in every task with carry = stack"),
    ("stack", ("lokr", "dora"), "expected lora or lokr in every task with carry = stack"),
    ("adapter", ("lokr", "dora"), "expected lokr, as of the task that this one goes on from, got "),
])
def test_adapters_that_do_not_go_together_are_refused(make, tmp_path, carry, kinds, message):
    config = make(carry=carry)
    for task, kind in zip(config.tasks, kinds, strict=True):
        task["lora.kind"] = kind
    with pytest.raises(ValueError, match=rf"task 2 \(second\): lora.kind: {message}"):
        tasks.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_directories_of_others_and_damaged_histories_are_refused(make, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "photo.png").write_text("")
    with pytest.raises(ValueError, match="holds other things than tasks"):
        tasks.run(make(), tmp_path / "run")
    (tmp_path / "run" / "tasks.json").write_text('{"carry": "stack"')
    with pytest.raises(ValueError, match=r"tasks.json: damaged"):
        tasks.run(make(), tmp_path / "run")
    with pytest.raises(ValueError, match="without a comma"):
        tasks.run(make(), tmp_path / "a,b")
    with pytest.raises(ValueError, match="expected a directory of this machine"):
        tasks.run(make(), "gs://bucket/run")


def test_average_and_backward_transfer():
    values = np.array([[0.9, np.nan, np.nan], [0.7, 0.8, np.nan], [0.6, 0.9, 0.5]])
    found = matrix_lib.Matrix(("a", "b", "c"), "accuracy", values, np.zeros(3), {}, True)
    assert found.average == pytest.approx((0.6 + 0.9 + 0.5) / 3)
    assert found.backward_transfer == pytest.approx((-0.3 + 0.1) / 2)
    less = matrix_lib.Matrix(("a", "b", "c"), "distance", values, np.zeros(3), {}, False)
    assert less.backward_transfer == pytest.approx((0.3 - 0.1) / 2)
    one = matrix_lib.Matrix(("a",), "accuracy", values[:1, :1], np.zeros(1), {}, True)
    assert np.isnan(one.backward_transfer) and "Backward" not in matrix_lib.as_markdown(one)


def start(config, workdir):
    file = workdir.parent / f"{workdir.name}.py"
    file.write_text(SEQUENCE.format(values=config.to_dict()))
    return subprocess.Popen(
        [sys.executable, "-m", "dopsd_jax.tasks", "--config", str(file), "--workdir", str(workdir)],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )


def same_files(one, two, names):
    return all(
        [dict(r, images_per_second=0) for r in read_metrics(one / n, file)]
        == [dict(r, images_per_second=0) for r in read_metrics(two / n, file)]
        for n in names for file in ("metrics.jsonl", GAUGES)
    )


def kill_and_compare(config, tmp_path, kills, seed, longest):
    """Kills a sequence at random instants and compares its end with that of one left alone.

    Returns:
        How often it was killed: less than `kills` where it came to its end before.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(config, whole)
    assert process.wait() == 0, process.stderr.read()
    rng, count = random.Random(seed), 0
    while True:
        process = start(config, killed)
        try:
            status = process.wait(rng.uniform(0.5, longest) if count < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            count += 1
            continue
        assert status == 0, process.stderr.read()
        break
    names = ("1_first", "2_second")
    for name in names:
        one, two = (workdir_lib.read_lora(d / name)[0] for d in (whole, killed))
        assert moved(one, two) == 0
    assert same_files(whole, killed, names)
    return count


@pytest.mark.parametrize("carry", ["adapter", "stack", "full"])
def test_prompts_of_earlier_tasks_are_kept_as_they_were_taught(make, data, tmp_path, carry):
    """The second task goes on where the first ended, and rows that keep hold on to that."""
    own = tmp_path / "own.txt"
    own.write_text("a lighthouse\n")
    config = make(carry=carry, keep_earlier=True, changes={"keep_prompts": str(own)}, tasks=[
        {"name": "first", "data": str(data / "one"), "keep_share": 0.5},
        # Nothing moves, so that its end is where it began.
        {"name": "second", "data": str(data / "two"), "keep_share": 1.0, "learning_rate": 1e-30},
    ])
    first, second = tasks.run(config, tmp_path / "run")
    assert first.config.keep_prompts == str(own) and first.config.retain == "untuned"
    earlier = tmp_path / "run" / "keep_1_first.txt"
    assert second.config.keep_prompts == f"{own},{earlier}"
    assert earlier.read_text().splitlines() == ["one astronaut", "one chelsea"]
    rows = read_metrics(second.workdir)
    assert all(r["loss"] < 1e-9 and r["loss_teacher"] == 0 for r in rows)
    assert read_metrics(first.workdir)[-1]["loss_kept"] > 1e-9
    drifts = [r["drift"] for r in read_metrics(second.workdir, GAUGES)]
    assert drifts[0] > 0 and drifts == pytest.approx([drifts[0]] * 2, rel=1e-3)
    if carry == "adapter":
        assert second.config.init_lora == str(first.workdir) and not second.config.base_lora
        assert moved(*students((first, second))) < 1e-6
    if carry == "full":
        one, two = (workdir_lib.read_full(t.workdir) for t in (first, second))
        assert moved(one, two) == 0


def test_pictures_of_earlier_tasks_are_replayed_in_equal_parts(make, tmp_path):
    config = make(replay_share=0.5, keep_earlier=True, changes={"keep_share": 0.5}, tasks=[
        {"name": "a", "data": "1", "keep_share": 0.0},
        {"name": "b", "data": "2,3", "data_weights": "3,1"},
        {"name": "c", "data": "3"},
    ])
    found = tasks.planned(config, tmp_path)
    assert [t.config.data for t in found] == ["1", "2,3,1", "3,1,2"]
    assert [t.config.data_weights for t in found] == ["", "0.375,0.125,0.5", "0.5625,0.25,0.1875"]
    # Previews draw each task's own rows, and its prompts are those of its own data.
    assert [t.config.earlier_data for t in found] == ["", "1", "1;2,3"]
    assert [t.own.data for t in found] == ["1", "2,3", "3"]


def test_a_run_that_replays_sees_the_pictures_of_both(make, tmp_path):
    config = make(replay_share=0.5, changes={"num_train_steps": 2})
    second = tasks.run(config, tmp_path / "run")[1].config
    plan = read_data(second, needs_of_rows(second)).plan
    rows = [row for step in range(4) for row in plan.at(step).rows]
    assert sorted(row // 2 for row in rows) == [0] * 4 + [1] * 4  # two pictures in each data set


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["adapter", "stack"])
def test_twenty_kills_at_random_instants(make, tmp_path, carry):
    """Each life of a process makes a few seconds of progress, of a minute or more in all."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lighthouse\n")
    changes = {"num_train_steps": 600, "sample_every": 100, "checkpoint_every": 10}
    if carry == "adapter":  # with all that keeps what earlier tasks taught
        changes |= {"teacher": "untuned", "keep_prompts": str(prompts), "keep_share": 0.5,
                    "anchor": 0.1}
    config = make(carry=carry, changes=changes, replay_share=0.5)
    for task in config.tasks:
        task.pop("lora.rank", None)
    assert kill_and_compare(config, tmp_path, kills=20, seed=2, longest=14) == 20
