"""Distances and accuracies, on numbers whose answer is known."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg

from dopsd_jax.mini import judge
from dopsd_jax.mini.gates import as_markdown, verdicts
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
    judge.write(tmp_path / "j.safetensors", params, {"noto": gaussian(0)}, {"style": 0.5})
    got, real, report = judge.read(str(tmp_path / "j.safetensors"))
    np.testing.assert_array_equal(got["a"]["kernel"], params["a"]["kernel"])
    np.testing.assert_allclose(real["noto"][1], gaussian(0)[1], rtol=1e-6)
    assert report == {"style": 0.5}


def fair():
    """Results that pass every gate."""
    def row(frechet):
        return {"frechet": frechet, "style": 0.95, "concept": 0.85, "sharpness": 1.0}

    few = {"base 2 steps x1": 4.0, "base 48 steps x1": 2.0, "base 2 steps x2.5": 1.5,
           "base 48 steps x2.5": 1.0, "turbo 2 steps": 1.3, "turbo 4 steps": 1.3}
    tuned = {"0 updates, 2 steps": 1.3, "0 updates, 24 steps": 1.2, "50 updates, 2 steps": 2.6,
             "50 updates, 24 steps": 1.5}
    tuned |= {f"{n} updates, {s} steps": 9.0 for n in (100, 200) for s in (2, 24)}
    return {
        "best_guidance": 2.5, "few_steps": {k: row(v) for k, v in few.items()},
        "teacher": {"blueprint": row(1.0)}, "fine_tuned": {k: row(v) for k, v in tuned.items()},
    }


def holds(results):
    return {gate: verdict.holds for gate, verdict in verdicts(results, 2).items()}


def test_a_fair_model_passes_every_gate():
    assert holds(fair()) == dict.fromkeys("abcde", True)


@pytest.mark.parametrize("gate,part,row,figure,value", [
    ("a", "few_steps", "base 2 steps x1", "frechet", 3.9),
    ("a", "few_steps", "base 2 steps x2.5", "frechet", 1.4),
    ("b", "few_steps", "turbo 2 steps", "frechet", 1.4),
    ("b", "few_steps", "turbo 4 steps", "frechet", 1.4),
    ("c", "few_steps", "turbo 2 steps", "concept", 0.79),
    ("c", "few_steps", "turbo 2 steps", "style", 0.89),
    ("d", "teacher", "blueprint", "concept", 0.79),
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
    assert "| turbo 2 steps | 1.3 | 0.950 | 0.500 | 1.0 |" in text
    assert "400 pictures per figure" in text and "| base 48 steps x2.5 | 7.2 | 0.500 |" in text
    assert "| 50 updates, 24 steps | 1.5 |" in text and "| blueprint | 1.0 |" in text
    assert text.count("holds") == 4 and "| 0.50; 0.95 | **missed** |" in text
