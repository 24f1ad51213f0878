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
    tail = stats.norm.cdf(
        -math.sqrt(cases / (cases - 1)) * stats.t.ppf(0.5 + level / 2, cases - 1)
    )
    value = float(statistic(np.arange(cases)))
    bias = np.mean(values) - value if centred else 0.0
    low, high = np.quantile(values, [tail, 1 - tail]) - bias
    return Interval(value, float(low), float(high))


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
