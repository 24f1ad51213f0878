"""Intervals on synthetic data whose truth is known."""

import numpy as np
import pytest

from dopsd_jax.compare.stats import interval, mean_interval, ratio_interval


def coverage(draw, truth, trials=600):
    """Share of intervals that hold the truth."""
    held = 0
    for trial in range(trials):
        found = mean_interval(draw(np.random.default_rng(trial)), draws=400, seed=trial)
        held += found.low <= truth <= found.high
    return held / trials


@pytest.mark.parametrize("cases", [12, 40])
def test_95_percent_of_intervals_hold_the_mean(cases):
    assert abs(coverage(lambda r: r.normal(2, 3, cases), 2.0) - 0.95) <= 0.03


def test_seeds_of_a_case_are_not_counted_as_cases():
    """Cases differ more than seeds: an interval over all pictures at once would hold too little."""
    def draw(rng):
        return rng.normal(0, 1, (24, 1)) + rng.normal(0, 0.3, (24, 8))

    assert abs(coverage(draw, 0.0) - 0.95) <= 0.03
    assert coverage(lambda r: draw(r).ravel(), 0.0, trials=200) < 0.7


def test_a_paired_difference_of_accuracies_is_covered():
    """Two models on the same cases, right with 0.8 and 0.6 of them, by case together."""
    def draw(rng):
        hard = rng.uniform(size=(48, 8))
        return (hard < 0.8).astype(float) - (hard < 0.6)

    assert abs(coverage(draw, 0.2) - 0.95) <= 0.03


def test_an_interval_shrinks_with_more_cases_and_repeats_itself():
    rng = np.random.default_rng(0)
    few, many = mean_interval(rng.normal(size=20)), mean_interval(rng.normal(size=2000))
    assert few.high - few.low > 5 * (many.high - many.low)
    values = rng.normal(size=30)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values).value == pytest.approx(values.mean())


def test_a_distance_that_grows_by_resampling_keeps_its_estimate_inside():
    """Squared distance of means in 20 dimensions: repeats alone push it up."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40, 20)), rng.normal(0.3, size=(1000, 20)).mean(0)

    def distance(index):
        return np.square(a[index].mean(0) - b).sum()

    plain, centred = (interval(distance, 40, centred=c) for c in (False, True))
    assert centred.low < centred.value < centred.high
    assert plain.high - plain.low == pytest.approx(centred.high - centred.low)
    assert plain.low > centred.low + 0.1


def test_a_ratio_of_means_is_exact_where_cases_move_together():
    rng = np.random.default_rng(2)
    before = rng.uniform(1, 20, (30, 4))
    assert mean_interval(0.5 * before).high > 1.2 * mean_interval(0.5 * before).low
    found = ratio_interval(0.5 * before, before)
    assert np.allclose([found.value, found.low, found.high], 0.5)


def test_any_statistic_and_refusals():
    x = np.arange(50.0)
    found = interval(lambda i: np.median(x[i]), 50)
    assert found.value == 24.5 and found.low < 24.5 < found.high
    with pytest.raises(ValueError, match="at least 2 cases, got 1"):
        mean_interval(np.ones((1, 5)))
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, np.nan])
