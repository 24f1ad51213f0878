"""Comparisons on points whose answer is known."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from dopsd_jax.compare import runs, table
from dopsd_jax.compare.measures import NEW_SEEN, NEW_UNSEEN, OLD, Measured, case_sets
from dopsd_jax.mini import drawing
from dopsd_jax.mini.judge import moments
from dopsd_jax.mini.labels import WORLD

TUNED = ("apple", "banana", "car")
SHARES = np.linspace(0.3, 0.9, 8)


@pytest.fixture(scope="module")
def sets():
    return case_sets(WORLD, "blueprint", TUNED, old=drawing.draw_cases(WORLD, 10, seed=7), seeds=4)


def point(sets, method="dopsd", *, new, old, rate=1e-3, step=25, seed=0):
    """A share `new` of the new style's pictures and `old` of the old ones are right."""
    rng = np.random.default_rng(seed)

    def measured(name, share):
        n = len(sets[name].rows)
        right = np.arange(n) < round(share * n)
        return Measured(right, right, np.full(n, 2.0), np.full(n, 0.5),
                        rng.standard_normal((n, 64)))

    return table.Point(method, rate, 0, step, 2, 1.0, {
        NEW_SEEN: measured(NEW_SEEN, new), NEW_UNSEEN: measured(NEW_UNSEEN, new),
        OLD: measured(OLD, old),
    })


def test_sets_ask_for_tuned_things_other_things_and_old_styles(sets):
    seen, unseen, old = (sets[n].rows for n in (NEW_SEEN, NEW_UNSEEN, OLD))
    assert seen.captions[:4] == ["an apple, blueprint style"] * 4
    assert len(unseen) == 4 * (len(WORLD.trained_concepts) - 3) and len(old) == 40
    assert not any(t in c.split(",")[0].split() for c in unseen.captions for t in TUNED)
    new = WORLD.styles.index("blueprint")
    assert np.all(seen.styles == new) and not np.any(old.styles == new)
    noises = np.concatenate([s.rows.seeds for s in sets.values()])
    assert len(set(noises.tolist())) == len(noises)
    with pytest.raises(ValueError, match="mini world, got .'teapot'"):
        case_sets(WORLD, "blueprint", ["teapot"], old=drawing.draw_cases(WORLD, 1), seeds=1)


def test_of_a_method_counts_where_it_retains_most_of_what_has_learned_enough(sets):
    ours = [point(sets, new=n, old=o) for n, o in ((0, 1), (0.5, 0.9), (1, 0.5))]
    theirs = [point(sets, "sft", new=n, old=o) for n, o in ((0, 1), (0.25, 0.8), (0.75, 0.2))]
    assert table.best_at(ours, 0.7) is ours[2] and table.best_at(theirs, 0.7) is theirs[2]
    assert table.best_at(ours, 0.5) is ours[1]  # among those that reach it, what retains most
    assert table.best_at(theirs, 0.9) is None


def test_a_row_has_the_shares_and_a_distance_of_zero_to_itself(sets):
    base, tuned = point(sets, new=0, old=1), point(sets, new=0.5, old=0.6)
    real = moments(base.sets[NEW_UNSEEN].features)
    row = table.row_of([tuned], sets, base, real)
    assert row["new style, other things: style"].value == pytest.approx(0.5)
    assert row["old: both"].value == pytest.approx(0.6)
    assert row["old: both"].low < 0.6 < row["old: both"].high
    assert row["copying"].value == pytest.approx(0.5)
    assert row["old: sharpness / untuned's"].value == 1
    itself = table.row_of([base], sets, base, real)
    found = itself["old: Frechet to untuned"]
    assert np.allclose([found.value, found.low, found.high], 0, atol=1e-6)
    three = table.row_of([tuned] * 3, sets, base, real)
    assert three["old: both"].value == row["old: both"].value


def test_methods_are_compared_seed_by_seed(sets):
    """Trainings that differ by much and alike do not hide what always differs."""
    ours, theirs = (
        [point(sets, new=n - less, old=n - less, seed=i) for i, n in enumerate(SHARES)]
        for less in (0.25, 0)
    )
    found = table.beside(ours, theirs, sets, "another's")
    assert list(found) == ["new style, less another's", "old: both, less another's",
                           "old: sharpness, less another's"]
    for name in list(found)[:2]:
        assert abs(found[name].value + 0.25) < 0.02 and found[name].low < found[name].value
    assert found[name].high < 0 and found["old: sharpness, less another's"].low == 0
    alone = table.beside(ours[:1], theirs, sets, "another's")  # no seed to pair with
    assert abs(alone["old: both, less another's"].value - (0.05 - np.mean(SHARES))) < 0.03


def test_a_paired_difference_has_the_sign_of_the_first(sets):
    good, bad = point(sets, new=0.5, old=0.9), point(sets, new=0.5, old=0.4)
    found = table.paired([bad], [good], sets)
    assert found.value == pytest.approx(-0.5) and found.high < 0
    assert table.paired([good], [good], sets).value == 0


def test_the_table_and_the_list_of_pictures_hold_everything(sets, tmp_path):
    base, tuned = point(sets, new=0, old=1), point(sets, new=0.5, old=0.6)
    row = table.row_of([tuned], sets, base, moments(base.sets[NEW_UNSEEN].features))
    text = table.as_markdown({"a": row, "b": {"old: both": row["old: both"]}})
    lines = text.splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "0.600 [" in lines[2]
    table.write_csv(tmp_path / "p.csv", [base, tuned], sets)
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert len(rows) == 2 * sum(len(s.rows) for s in sets.values())
    share = np.mean([int(r["style"]) for r in rows[len(rows) // 2 :] if r["set"] == OLD])
    assert share == pytest.approx(0.6)


def test_own_prompts_tell_what_their_pictures_must_show():
    captions = ["Sepia style, a red Cat and a key", "three owls in ink style"]
    cases = drawing.read_cases(WORLD, captions)
    assert [WORLD.styles[i] for i in cases.styles] == ["sepia", "ink"]
    shown = [{c for c, yes in zip(WORLD.concepts, row, strict=True) if yes}
             for row in cases.concepts]
    assert shown == [{"cat", "key"}, {"owl"}]
    with pytest.raises(ValueError, match=r"one style .* got \['a cat', 'a wolf, ink style'\]"):
        drawing.read_cases(WORLD, ["a cat", "an owl, ink style", "a wolf, ink style"])


def test_what_tuning_did_to_few_steps_is_told_beside_the_untuned(sets):
    before, blurred = (point(sets, new=0, old=1, seed=s) for s in (0, 1))
    old = blurred.sets[OLD]
    blurred.sets[OLD] = dataclasses.replace(
        old, features=old.features + 3, sharpness=0.5 * old.sharpness
    )
    real = moments(point(sets, new=0, old=1, seed=2).sets[OLD].features)
    row = table.few_step_row(blurred, before, sets, real)
    assert row["2 steps: Frechet to real"].value > 0.9 * 9 * 64
    assert row["2 steps: the same / untuned's"].low > 2
    assert row["2 steps: sharpness / untuned's"].value == pytest.approx(0.5)
    same = table.few_step_row(before, before, sets, real)
    assert same["2 steps: the same / untuned's"].value == 1


def test_a_run_on_other_weights_is_not_drawn_with_the_shipped_ones(tmp_path):
    config = {"model": "mini", "trainable": "lora", "teacher": "ema", "lora": {},
              "learning_rate": 1e-3, "seed": 0}
    for name, more in (("a", {}), ("b", {"transformer_file": "other.safetensors"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | more))
        (tmp_path / name / "identity.json").write_text("{}")
    assert [run.name for run in runs.own_runs(f"{tmp_path}/a")] == ["a"]
    with pytest.raises(ValueError, match=r"b was trained with transformer_file=other.safetensors"):
        runs.own_runs(f"{tmp_path}/a,{tmp_path}/b")
