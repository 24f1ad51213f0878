"""Distances and accuracies, on numbers whose answer is known."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.linalg
from safetensors.numpy import save_file

from dopsd_jax.mini import judge
from dopsd_jax.mini.gates import as_markdown, copied, verdicts
from dopsd_jax.mini.labels import Labels
from dopsd_jax.run.gauges import sharpness


def gaussian(seed, dim=6):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((dim, dim))
    return rng.standard_normal(dim), a @ a.T


def test_frechet_distance_equals_its_formula():
    (m, c), (n, d) = gaussian(0), gaussian(1)
    want = np.square(m - n).sum() + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert judge.frechet_distance((m, c), (n, d)) == pytest.approx(want, rel=1e-9)


def test_frechet_distance_of_the_same_is_zero_and_of_a_shift_its_square():
    m, c = gaussian(2)
    assert judge.frechet_distance((m, c), (m, c)) == pytest.approx(0, abs=1e-9)
    assert judge.frechet_distance((m, c), (m + 2, c)) == pytest.approx(4 * len(m), rel=1e-9)


def test_moments_are_those_of_numpy():
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    mean, cov = judge.moments(x)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.astype(np.float64).T), rtol=1e-12)


def test_concepts_are_right_when_the_asked_ones_are_the_likeliest():
    said = judge.Opinion(np.zeros((3, 2)), np.array([0, 1, 1]), np.array(
        [[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 5.0, -1.0]]
    ))
    asked = np.array([[True, False, True], [True, True, False], [False, True, False]])
    assert said.concept_accuracy(asked).tolist() == [True, False, True]
    assert said.style_accuracy(np.array([0, 0, 1])).tolist() == [True, False, True]


def test_sharpness_is_zero_on_a_ramp_and_grows_with_edges():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (1, 64, 64, 3))
    edges = np.where((np.arange(64) % 8 < 4)[None, None, :, None], 200, 0).astype(np.uint8)
    edges = np.broadcast_to(edges, (1, 64, 64, 3))
    flat, sharp = sharpness(np.concatenate([ramp, edges]))
    assert flat == 0 and sharp > 50


def test_a_judge_file_gives_back_what_was_written(tmp_path):
    params = {"a": {"kernel": np.ones((2, 2), np.float32)}}
    labels = Labels(("noto", "sepia"), ("cat", "owl"), ("sepia",), ("owl",))
    file = tmp_path / "j.safetensors"
    judge.write(file, params, labels, {"noto": gaussian(0)}, {"style": 0.5})
    got = judge.read(str(file))
    np.testing.assert_array_equal(got.params["a"]["kernel"], params["a"]["kernel"])
    np.testing.assert_allclose(got.real["noto"][1], gaussian(0)[1], rtol=1e-6)
    assert got.report == {"style": 0.5} and got.labels == labels
    assert got.labels.trained_styles == ("noto",) and got.labels.trained_concepts == ("cat",)
    save_file({"params/a": np.ones(2, np.float32)}, tmp_path / "nameless.safetensors")
    with pytest.raises(ValueError, match=r"expected metadata with labels and report, found \[\]"):
        judge.read(str(tmp_path / "nameless.safetensors"))


def test_a_moved_picture_takes_the_middle_of_its_object_along():
    pixels = np.zeros((40, 64, 64, 3), np.uint8)
    middles = np.random.default_rng(0).uniform(10, 54, (40, 2)).astype(np.float32)
    for picture, (x, y) in zip(pixels, middles, strict=True):
        picture[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3] = 255
    moved, told = judge.shifted(pixels, middles, jax.random.key(3))
    found = [np.argwhere(p[..., 0] > 0).mean(0)[::-1] + 0.5 for p in np.asarray(moved)]
    np.testing.assert_allclose(told, found, atol=0.51)
    assert np.abs(found - middles).max() > 20  # mirrored ones


def test_a_judge_is_read_in_the_sizes_it_was_written_in():
    network = judge.Judge((("styles", 2), ("concepts", 3)), widths=(8, 8, 16, 24))
    params = network.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))["params"]
    assert judge.network_of(params) == network
    said = judge.opinion(params, np.zeros((3, 64, 64, 3), np.uint8))
    assert said.concepts.shape == (3, 3) and said.counts is None


def test_what_is_copied_is_told_from_what_falls_together():
    shown = np.random.default_rng(0).uniform(20, 44, (300, 2)).astype(np.float32)
    drawn, shown[::3] = shown + 1, np.nan
    own, chance = copied(drawn, shown)
    assert own == 1 and chance < 0.15
    own, chance = copied(np.full_like(drawn, 32), shown)
    assert own == pytest.approx(chance, abs=1e-6)  # always in the middle: nothing is copied


def fair():
    """Results that pass every gate."""
    def row(frechet):
        return {"frechet": frechet, "style": 0.99, "concept": 0.95, "sharpness": 1.0}

    few = {"base 2 steps x1": 4.0, "base 48 steps x1": 2.0, "base 2 steps x2.5": 1.5,
           "base 48 steps x2.5": 1.0, "turbo 2 steps": 1.2, "turbo 4 steps": 1.2}
    tuned = {"0 updates, 2 steps": 1.3, "0 updates, 24 steps": 1.2, "50 updates, 2 steps": 2.6,
             "50 updates, 24 steps": 1.5}
    tuned |= {f"{n} updates, {s} steps": 9.0 for n in (100, 200) for s in (2, 24)}
    return {
        "best_guidance": 2.5, "few_steps": {k: row(v) for k, v in few.items()},
        "teacher": {style: row(1.0) | {"copied": 0.1, "copied_by_chance": 0.08}
                    for style in ("blueprint", "chalk")},
        "fine_tuned": {k: row(v) for k, v in tuned.items()},
    }


def holds(results):
    return {gate: verdict.holds for gate, verdict in verdicts(results, 2).items()}


def test_a_fair_model_passes_every_gate():
    assert holds(fair()) == dict.fromkeys("abcde", True)


@pytest.mark.parametrize("gate,part,row,figure,value", [
    ("a", "few_steps", "base 2 steps x1", "frechet", 3.9),
    ("a", "few_steps", "base 2 steps x2.5", "frechet", 1.4),
    ("b", "few_steps", "turbo 2 steps", "frechet", 1.21),
    ("b", "few_steps", "turbo 4 steps", "frechet", 1.21),
    ("c", "few_steps", "turbo 2 steps", "concept", 0.92),
    ("c", "few_steps", "turbo 2 steps", "style", 0.97),
    ("d", "teacher", "blueprint", "concept", 0.84),  # of .9 of 0.95
    ("d", "teacher", "chalk", "style", 0.94),
    ("d", "teacher", "chalk", "copied", 0.14),
    ("e", "fine_tuned", "50 updates, 2 steps", "frechet", 2.5),
    ("e", "fine_tuned", "50 updates, 24 steps", "frechet", 1.7),
])
def test_each_figure_can_fail_its_gate_alone(gate, part, row, figure, value):
    results = fair()
    results[part][row][figure] = value
    assert holds(results) == dict.fromkeys("abcde", True) | {gate: False}


def test_the_cards_tables_tell_every_figure_and_what_is_missed():
    results = fair() | {"samples": 2000, "guidance": {"x2.5": {
        "frechet": 7.25, "style": 0.5, "concept": 0.25, "sharpness": 3.0}}}
    results["few_steps"]["turbo 2 steps"]["concept"] = 0.5
    results["gates"] = {k: dataclasses.asdict(v) for k, v in verdicts(results, 2).items()}
    text = as_markdown(results)
    assert "| turbo 2 steps | 1.2 | 0.990 | 0.500 | 1.0 |" in text
    assert "400 pictures per figure" in text and "| base 48 steps x2.5 | 7.2 | 0.500 |" in text
    assert "| chalk | 0.100 | 0.080 |" in text
    assert "| 50 updates, 24 steps | 1.5 |" in text and "| blueprint | 1.0 |" in text
    assert text.count("holds") == 4 and "| 0.50; 0.99 | **missed** |" in text
