"""Intervals by the bootstrap over cases; the seeds of one case stay together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy import stats

DRAWS = 2000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate between its bounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Shares to a thousandth, distances of 10 and more without decimals."""
        digits = 0 if abs(self.value) >= 10 else 3
        value, low, high = (
            f"{round(x, digits) + 0.0:.{digits}f}" for x in (self.value, self.low, self.high)
        )
        return f"{value} [{low}, {high}]"


def interval(
    statistic: Callable[[np.ndarray], float], cases: int, *, draws: int = DRAWS,
    level: float = LEVEL, seed: int = 0, centred: bool = False,
) -> Interval:
    """Bootstrap interval of any statistic of cases.

    Percentiles of resampled cases, widened as Student's t is against the normal and by
    sqrt(n / (n - 1)), because plain percentiles are too narrow for few cases.
    Source: Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 4.4.

    Args:
        statistic: int [cases], numbers of cases with repetition -> value.
        cases: How many there are, at least 2.
        draws: Resamples.
        level: Share of intervals that should hold the truth.
        seed: Of the resampling.
        centred: Move the interval by what resampling alone adds to the statistic. For distances,
            which grow when cases repeat: the plain interval may not even hold its own estimate.

    Raises:
        ValueError: Fewer than 2 cases.
    """
    if cases < 2:
        raise ValueError(f"interval: expected at least 2 cases, got {cases}")
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(cases, size=cases)) for _ in range(draws)]
    value = float(statistic(np.arange(cases)))
    bias = np.mean(values) - value if centred else 0.0
    low, high = np.quantile(values, _tails(cases, level)) - bias
    return Interval(value, float(low), float(high))


def crossed_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float], seeds: int, cases: int, *,
    draws: int = DRAWS, level: float = LEVEL, seed: int = 0,
) -> Interval:
    """Bootstrap interval of a statistic of training seeds and prompts, which both are samples.

    Each resample draws seeds and, independently, cases, both with repetition: what differs between
    trainings and what differs between prompts both count. Widened as in `interval`, for the fewer
    of the two. Source: Owen, "The pigeonhole bootstrap", 2007, arXiv 0712.1111.

    Args:
        statistic: int [seeds], int [cases], numbers with repetition -> value.
        seeds, cases: How many there are, at least 2 of each.
        draws, level, seed: As of `interval`.

    Raises:
        ValueError: Fewer than 2 of either.
    """
    if min(seeds, cases) < 2:
        raise ValueError(f"crossed_interval: expected at least 2 seeds and 2 cases, got {seeds} "
                         f"and {cases}")
    rng = np.random.default_rng(seed)
    values = [
        statistic(rng.integers(seeds, size=seeds), rng.integers(cases, size=cases))
        for _ in range(draws)
    ]
    low, high = np.quantile(values, _tails(min(seeds, cases), level))
    value = float(statistic(np.arange(seeds), np.arange(cases)))
    return Interval(value, float(low), float(high))


def _tails(count: int, level: float) -> tuple[float, float]:
    """Which quantiles of resamples bound an interval; see `interval`."""
    tail = float(stats.norm.cdf(
        -math.sqrt(count / (count - 1)) * stats.t.ppf(0.5 + level / 2, count - 1)
    ))
    return tail, 1 - tail


def ratio_interval(ours: np.ndarray, others: np.ndarray) -> Interval:
    """Interval of a ratio of means, [cases, seeds] each, case by case."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1).mean(1) for x in (ours, others))
    return interval(lambda index: a[index].mean() / b[index].mean(), len(a))


def mean_interval(values: np.ndarray, **options) -> Interval:
    """Interval of a mean, of [cases] or of [cases, seeds]; a paired difference is one of a - b.

    Raises:
        ValueError: Fewer than 2 cases, or values that are not finite.
    """
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("mean_interval: expected finite values, got NaN or infinity")
    means = values.reshape(len(values), -1).mean(1)
    return interval(lambda index: means[index].mean(), len(means), **options)
