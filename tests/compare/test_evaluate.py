"""The whole comparison on the shipped model, as small as it goes; and own runs. Minutes: slow."""

import csv
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import mini_claim
from dopsd_jax import evaluate as evaluate_lib
from dopsd_jax.compare import jobs
from dopsd_jax.compare.measures import OLD

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config():
    c = mini_claim.get_config()
    c.methods = ConfigDict({"dopsd": {}, "sft": {"objective": "sft"}})
    c.learning_rates = (1e-3,)
    c.num_train_steps, c.measure_every = 2, 1
    c.training_seeds, c.generation_seeds, c.old_prompts = 2, 2, 4
    c.same_data_methods, c.same_data_pictures = ("sft",), 8
    return c


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("claim")
    evaluate_lib.evaluate(config, workdir)
    return workdir


def test_it_leaves_tables_for_every_way_of_drawing_and_pictures(workdir):
    text = (workdir / "table.md").read_text()
    for title in ("### 2 steps\n", "### 4 steps", "### 12 steps", "### 2 steps, guidance 2.5"):
        assert title in text
    rows = [line for line in text.splitlines() if line.startswith("| sft")]
    assert len(rows) == 5 and all("[" in line for line in rows)  # the last on the training data
    floor = [line for line in text.splitlines() if line.startswith("| untuned, other noise")]
    assert len(floor) == 4
    page = (workdir / "report.html").read_text()
    assert page.count("<table>") == 5 and page.count("<img ") == 2
    assert (workdir / "grid.png").is_file() and (workdir / "curves.png").is_file()
    with (workdir / "pictures.csv").open() as f:
        seen = {(r["method"], r["step"]) for r in csv.DictReader(f)}
    assert {("untuned", "0"), ("dopsd", "1"), ("dopsd", "2"), ("sft", "2")} <= seen


def test_what_is_done_is_not_done_again(config, workdir, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("trained or drew again")

    monkeypatch.setattr(jobs.subprocess, "run", refuse)
    monkeypatch.setattr(evaluate_lib.Bench, "measure", refuse)
    before = (workdir / "table.md").read_text()
    assert evaluate_lib.evaluate(config, workdir) == before


def test_own_runs_are_compared_as_they_are(config, workdir, tmp_path):
    own = mini_claim.get_config().copy_and_resolve_references()
    own.update(config)
    runs = sorted((workdir / "runs").iterdir())
    own.checkpoints = ",".join(map(str, runs[:2]))
    own.prompts = ("a cat, neon style", "a red car, noto style")
    text = evaluate_lib.evaluate(own, tmp_path)
    with (tmp_path / "pictures.csv").open() as f:
        assert {r["prompt"] for r in csv.DictReader(f) if r["set"] == OLD} == set(own.prompts)
    assert all(f"| {run.name} (" in text for run in runs[:2])
    own.checkpoints = str(tmp_path / "none")
    with pytest.raises(ValueError, match="none: expected a run's directory"):
        evaluate_lib.evaluate(own, tmp_path)


def test_own_runs_may_be_drawn_together(config, workdir, tmp_path):
    """With a strength of 0 the second LoRA is not there; with 1 it is."""
    first, second = sorted(map(str, (workdir / "runs").iterdir()))[:2]
    rows = {}
    for name, given in (("alone", first), ("with 0", f"{first}+{second}:0"),
                        ("both", f"{first}+{second}"), ("half", f"{first}:0.5+{second}:0.5")):
        own = mini_claim.get_config().copy_and_resolve_references()
        own.update(config)
        own.checkpoints = given
        text = evaluate_lib.evaluate(own, tmp_path / name)
        head = {"alone": "", "with 0": ":0", "both": "", "half": ":0.5"}[name]
        label = Path(first).name if name == "alone" else f"+{Path(second).name}{head}"
        rows[name] = [line.rpartition(" updates) |")[2] for line in text.splitlines()
                      if f"{label} (" in line]
        assert len(rows[name]) == 4
    assert rows["alone"] == rows["with 0"] != rows["both"] != rows["half"]
    own.checkpoints = f"{first}+{second}:half"
    with pytest.raises(ValueError, match="expected PATH or PATH:STRENGTH"):
        evaluate_lib.evaluate(own, tmp_path / "bad")
