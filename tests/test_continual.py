"""Runs that stand on earlier ones: LoRAs beside the one that trains, and what to go on from."""

import json

import numpy as np
import pytest

from dopsd_jax import sample, weights
from dopsd_jax import train as train_lib
from dopsd_jax.core import trees
from dopsd_jax.core.metrics import GAUGES, read_metrics
from dopsd_jax.data.files import DataError
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights import lora_files


@pytest.fixture(scope="module")
def pipe(tiny):
    return weights.load_pipeline(tiny.pipeline, dtype="float32")


@pytest.fixture(scope="module")
def config(make_short_run):
    """A run that draws nothing; to be copied."""
    config = make_short_run()
    config.sample_every, config.preflight = 0, "off"
    return config


def changed(config, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def first(config, tmp_path_factory):
    """The workdir of a first task, its LoRA large enough to be seen."""
    workdir = tmp_path_factory.mktemp("continual") / "first"
    train_lib.train(changed(config, learning_rate=5e-2), workdir)
    return workdir


def student(workdir, step=None):
    return trees.flatten(workdir_lib.read_lora(workdir, step=step)[0])


def deltas(lora, scale):
    return {path: scale * np.asarray(a) @ np.asarray(b) for path, a, b in lora_lib.pairs(lora)}


def first_loss(workdir):
    return read_metrics(workdir)[0]["loss"]


def test_a_second_task_stands_on_the_first(config, first, pipe, tmp_path):
    """Its first student draws what the first task's draws; both together are drawn by both."""
    second = tmp_path / "second"
    # At so small a rate a new LoRA stays where it began: at nothing.
    still = changed(config, base_lora=str(first), learning_rate=1e-30)
    train_lib.train(still, second)
    ours, alone = (
        sample.generate(pipe, ["a cat"], num_steps=2, height=32, width=32, lora=lora)
        for lora in ([str(first), str(second)], str(first))
    )
    np.testing.assert_array_equal(ours, alone)
    untuned = sample.generate(pipe, ["a cat"], num_steps=2, height=32, width=32)
    assert np.any(alone != untuned)
    plain = changed(config, learning_rate=1e-30)
    train_lib.train(plain, tmp_path / "plain")
    assert abs(first_loss(second) / first_loss(tmp_path / "plain") - 1) > 1e-3


def test_strengths_of_earlier_loras_count(config, first, tmp_path):
    """Half of one twice, as a copy, is all of it."""
    tree, spec = workdir_lib.read_lora(first)
    file = tmp_path / "copy.safetensors"
    lora_files.save_diffusers(file, tree, spec, _modules(config))
    found = {}
    for name, given in (("whole", str(first)), ("halves", f"{first}:0.5,{file}:0.5"),
                        ("half", f"{first}:0.5")):
        train_lib.train(changed(config, base_lora=given, num_train_steps=1), tmp_path / name)
        found[name] = first_loss(tmp_path / name)
    np.testing.assert_allclose(found["halves"], found["whole"], rtol=1e-5)
    assert abs(found["half"] / found["whole"] - 1) > 1e-4


def _modules(config):
    return weights.load_pipeline(config.model, parts=()).lora.modules


def test_a_run_goes_on_from_a_lora(config, first, tmp_path):
    """Of a smaller rank; alpha may be another."""
    rank = 6
    changes = {"init_lora": str(first), "lora.rank": rank, "lora.alpha": 3.0,
               "learning_rate": 1e-30}
    train_lib.train(changed(config, **changes), tmp_path / "run")
    tree, spec = workdir_lib.read_lora(tmp_path / "run")
    before, spec_before = workdir_lib.read_lora(first)
    assert lora_lib.max_rank(tree) == rank and spec.scale != spec_before.scale
    got, want = deltas(tree, spec.scale), deltas(before, spec_before.scale)
    assert got.keys() == want.keys()
    for name in want:
        scale = np.abs(want[name]).max()
        assert scale > 0
        np.testing.assert_allclose(got[name], want[name], atol=1e-5 * scale, err_msg=name)


def test_all_weights_go_on_from_a_run(config, tiny, tmp_path):
    """And what counts as untuned is the model, not where the run began."""
    full = changed(config, trainable="full", learning_rate=1e-2, anchor=1.0)
    train_lib.train(full, tmp_path / "first")
    assert read_metrics(tmp_path / "first")[0]["loss_anchor"] < 1e-9  # it begins at the model
    second = changed(full, init_full=str(tmp_path / "first"), learning_rate=1e-30,
                     sample_every=2, gauge_prompts=("a cat",))
    train_lib.train(second, tmp_path / "second")
    one, two = (workdir_lib.read_full(tmp_path / n) for n in ("first", "second"))
    for name, x in trees.flatten(one).items():
        np.testing.assert_array_equal(trees.flatten(two)[name], x, err_msg=name)
    metrics = read_metrics(tmp_path / "second")
    assert metrics[0]["loss_anchor"] > 0
    gauges = read_metrics(tmp_path / "second", GAUGES)
    assert gauges[0]["step"] == 0 and gauges[0]["drift"] > 0


@pytest.mark.parametrize("earlier", ["base_lora", "init_lora"])
def test_the_untuned_teacher_knows_nothing_of_earlier_tasks(config, first, tmp_path, earlier):
    """So what it predicts at the states of one student is the same as without these tasks."""
    found = {}
    for name, changes in {
        "alone": {"teacher": "untuned"}, "as begun": {"teacher": "frozen"},
        "untuned": {"teacher": "untuned", earlier: str(first)},
        "frozen": {"teacher": "frozen", earlier: str(first)},
    }.items():
        changes |= {"learning_rate": 1e-30, "sample_every": 2}
        train_lib.train(changed(config, **changes), tmp_path / name)
        found[name] = read_metrics(tmp_path / name, GAUGES)[-1]["teacher_style"]
    assert found["untuned"] == found["alone"] == found["as begun"] != found["frozen"]
    with pytest.raises(ValueError, match="teacher=untuned, its teacher is the model itself"):
        workdir_lib.read_lora(tmp_path / "untuned", role="teacher")


def test_all_weights_are_taught_by_the_untuned_model(config, tmp_path):
    full = changed(config, trainable="full", learning_rate=1e-2)
    train_lib.train(full, tmp_path / "first")
    losses = {}
    for teacher in ("untuned", "frozen"):
        train_lib.train(changed(full, init_full=str(tmp_path / "first"), teacher=teacher,
                                learning_rate=1e-30), tmp_path / teacher)
        losses[teacher] = first_loss(tmp_path / teacher)
    assert abs(losses["untuned"] / losses["frozen"] - 1) > 1e-3


def test_rows_that_keep_are_trained_on_and_cannot_be_exchanged(config, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\na lighthouse\n")
    keeps = changed(config, keep_prompts=str(prompts), keep_share=0.5, num_train_steps=3,
                    checkpoint_every=2)
    train_lib.train(keeps, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [r["loss_kept"] > 0 for r in rows] == [False, True, True]  # nothing is lost at first
    assert all(r["loss_teacher"] > 0 for r in rows)
    moved = tmp_path / "moved.txt"
    moved.write_text("a red fox\n\na lighthouse\n")
    keeps.keep_prompts = str(moved)
    assert train_lib.train(keeps, tmp_path / "run") is None  # the same prompts elsewhere
    moved.write_text("a red fox\n")
    with pytest.raises(ValueError, match="contents of keep_prompts: the run has"):
        train_lib.train(keeps, tmp_path / "run")


def test_a_run_with_an_earlier_lora_refuses_another_on_resume(config, first, tmp_path):
    stands = changed(config, base_lora=f"{first}:0.5")
    train_lib.train(stands, tmp_path / "run")
    stands.base_lora = f"{first}:0.6"
    with pytest.raises(ValueError, match=r"contents of base_lora: the run has \w+ x 0.5, now \w+"):
        train_lib.train(stands, tmp_path / "run")


def test_a_run_of_before_a_key_was_there_goes_on(config, tmp_path):
    train_lib.train(config, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text())
    for key in ("anchor", "keep_share", "keep_prompts", "init_lora", "init_full"):
        del values[key]
    file.write_text(json.dumps(values))
    assert train_lib.train(config, tmp_path / "run") is None
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="anchor: the run has 0.0, now 1.0"):
        train_lib.train(changed(config, anchor=1.0), tmp_path / "run")


@pytest.mark.parametrize("changes, message", [
    ({"keep_share": 0.5}, "keep_prompts: expected a text file with keep_share = 0.5, got none"),
    ({"keep_prompts": "FILE"}, "keep_share: expected a share above 0 with keep_prompts, got 0"),
    ({"keep_prompts": "FILE", "keep_share": 0.3}, "whole number of the batch's 2 rows, such as"),
    ({"keep_prompts": "NONE", "keep_share": 0.5}, "keep_prompts: expected a text file .* at NONE"),
    ({"keep_prompts": "FILE", "keep_share": 0.5, "states": "noised"},
     "keep_share: expected 0 unless states = student"),
    ({"anchor": 1.0, "objective": "sft"}, "anchor: expected 0 with objective = sft"),
    ({"anchor": -1.0}, "anchor: expected 0 or a number above it"),
    ({"base_lora": "a,,b"}, "base_lora: expected .*paths"),
    ({"base_lora": "none:0.5"}, "base_lora: expected a LoRA file or a run's directory, found none"),
    ({"base_lora": "none:half"}, "base_lora: none:half: expected PATH or PATH:STRENGTH"),
    ({"init_lora": "FIRST", "trainable": "full"}, "init_lora: expected nothing with trainable"),
    ({"init_full": "FIRST"}, "init_full: expected nothing with trainable = lora"),
    ({"init_full": "NONE", "trainable": "full"}, "init_full: expected a run's directory, found"),
])
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    config, first, tmp_path, changes, message
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n")
    names = {"FILE": str(prompts), "FIRST": str(first)}
    changes = {k: names.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises((ValueError, DataError), match=message):
        train_lib.train(changed(config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lora_of_a_larger_rank_cannot_be_gone_on_from(config, first, tmp_path):
    with pytest.raises(ValueError, match="at most lora.rank: .* has rank 4, lora.rank = 2"):
        train_lib.train(changed(config, **{"init_lora": str(first), "lora.rank": 2}),
                        tmp_path / "run")


def test_the_same_lora_twice_is_refused(config, first, tmp_path):
    with pytest.raises(ValueError, match="given twice"):
        train_lib.train(changed(config, base_lora=f"{first},{first}:0.5"), tmp_path / "run")
