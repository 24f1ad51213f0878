"""Figures of runs -> what is compared: retention at matched accuracy in the new style."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dopsd_jax.compare.measures import NEW_SEEN, NEW_UNSEEN, OLD, CaseSet, Measured
from dopsd_jax.compare.stats import (
    Interval,
    crossed_interval,
    interval,
    mean_interval,
    ratio_interval,
)
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.markdown import markdown_table
from dopsd_jax.mini.judge import frechet_distance, moments

DRAWS = 200  # resamples of a Frechet distance, which is slow


@dataclasses.dataclass(frozen=True)
class Point:
    """A run at a step, drawn in some number of denoiser calls.

    Attributes:
        method, rate, seed, step: Of the run; step 0 is the untuned model.
        num_steps, guidance: How it was drawn.
        sets: By name.
    """

    method: str
    rate: float
    seed: int
    step: int
    num_steps: int
    guidance: float
    sets: dict[str, Measured]

    def new_style(self) -> float:
        """Style accuracy on the prompts of the new style, of both kinds together."""
        return float(np.concatenate([self.sets[n].style for n in (NEW_SEEN, NEW_UNSEEN)]).mean())

    def retention(self) -> float:
        """Share of old prompts whose picture shows both the style and the things asked for."""
        return float((self.sets[OLD].style & self.sets[OLD].concept).mean())

    def old_sharpness(self, base: Point) -> float:
        """Sharpness of the pictures of old prompts, as a share of another model's."""
        return float(self.sets[OLD].sharpness.mean() / base.sets[OLD].sharpness.mean())


def best_at(points: Sequence[Point], level: float) -> Point | None:
    """Of the points that reach a new-style accuracy, the one that retains most; None: none does."""
    reached = [p for p in points if p.new_style() >= level]
    return max(reached, key=Point.retention, default=None)


def _distance(features: np.ndarray, real: tuple[np.ndarray, np.ndarray]) -> float:
    """Frechet distance of features [.., 64] to (mean, covariance)."""
    return frechet_distance(moments(features.reshape(-1, features.shape[-1])), real)


def frechet(features: np.ndarray, real: tuple[np.ndarray, np.ndarray]) -> Interval:
    """Frechet distance of features [cases, pictures, 64] to (mean, covariance)."""
    return interval(
        lambda i: _distance(features[i], real), len(features), draws=DRAWS, centred=True
    )


def frechet_between(features: np.ndarray, others: np.ndarray) -> Interval:
    """The same of two models' pictures of the same cases."""
    def distance(i):
        return _distance(features[i], moments(others[i].reshape(-1, others.shape[-1])))

    return interval(distance, len(features), draws=DRAWS, centred=True)


def row_of(points: Sequence[Point], sets: dict[str, CaseSet], base: Point,
           real: tuple[np.ndarray, np.ndarray]) -> dict[str, Interval]:
    """The figures of one method: of its training seeds together.

    Args:
        points: One per training seed, drawn alike.
        sets: The cases.
        base: The untuned model, drawn alike.
        real: Moments of real pictures of the new style.
    """
    def of(name: str, values) -> Interval:
        return mean_interval(np.concatenate(
            [sets[name].by_case(values(p.sets[name])) for p in points], axis=1
        ))

    def features(name: str, of: Sequence[Point] = points) -> np.ndarray:
        shape = (sets[name].cases, sets[name].seeds, -1)
        return np.concatenate([p.sets[name].features.reshape(shape) for p in of], axis=1)

    def sharpness(of: Sequence[Point]) -> np.ndarray:
        return np.concatenate(
            [sets[OLD].by_case(p.sets[OLD].sharpness) for p in of], axis=1
        )

    return {
        "new style, tuned things: style": of(NEW_SEEN, lambda m: m.style),
        "new style, other things: style": of(NEW_UNSEEN, lambda m: m.style),
        "new style, other things: thing": of(NEW_UNSEEN, lambda m: m.concept),
        "new style: Frechet to real": frechet(features(NEW_UNSEEN), real),
        "copying": of(NEW_UNSEEN, lambda m: m.copying),
        "old: style": of(OLD, lambda m: m.style),
        "old: things": of(OLD, lambda m: m.concept),
        "old: both": of(OLD, lambda m: m.style & m.concept),
        "old: Frechet to untuned": frechet_between(features(OLD), features(OLD, [base])),
        "old: sharpness / untuned's": ratio_interval(sharpness(points), sharpness([base])),
    }


def few_step_row(now: Point, before: Point, sets: dict[str, CaseSet],
                 real: tuple[np.ndarray, np.ndarray]) -> dict[str, Interval]:
    """What tuning did to the pictures of old prompts, drawn in so many steps.

    Args:
        now, before: The tuned and the untuned model, drawn alike.
        sets: The cases.
        real: Moments of real pictures of the trained styles.
    """
    cases, way = sets[OLD], f"{now.num_steps} steps"
    ours, untuned = (
        p.sets[OLD].features.reshape(cases.cases, cases.seeds, -1) for p in (now, before)
    )
    return {
        f"{way}: Frechet to real": frechet(ours, real),
        f"{way}: the same / untuned's": interval(
            lambda i: _distance(ours[i], real) / _distance(untuned[i], real), cases.cases,
            draws=DRAWS, centred=True,
        ),
        f"{way}: sharpness / untuned's": ratio_interval(
            *(cases.by_case(p.sets[OLD].sharpness) for p in (now, before))
        ),
    }


def paired(points: Sequence[Point], others: Sequence[Point], sets: dict[str, CaseSet]) -> Interval:
    """Retention of `points` less that of `others`, case by case."""
    def values(of: Sequence[Point]) -> np.ndarray:
        return np.mean([
            sets[OLD].by_case(p.sets[OLD].style & p.sets[OLD].concept) for p in of
        ], axis=0)

    return mean_interval(values(points) - values(others))


def beside(
    points: Sequence[Point], others: Sequence[Point], sets: dict[str, CaseSet], whose: str
) -> dict[str, Interval]:
    """What a method draws less what another one does: new style, old prompts and their sharpness.

    Where both have as many training seeds, seed by seed, and the intervals are over seeds and
    prompts together; otherwise over prompts alone.
    """
    def difference(names: Sequence[str], values: Callable[[Measured], np.ndarray]) -> Interval:
        ours, theirs = (np.array([
            np.concatenate([sets[n].by_case(values(p.sets[n])).mean(1) for n in names])
            for p in of
        ], np.float64) for of in (points, others))
        if len(ours) != len(theirs) or len(ours) == 1:
            return mean_interval(ours.mean(0) - theirs.mean(0))
        off = ours - theirs
        return crossed_interval(lambda s, c: off[s][:, c].mean(), *off.shape)

    return {
        f"new style, less {whose}": difference((NEW_SEEN, NEW_UNSEEN), lambda m: m.style),
        f"old: both, less {whose}": difference((OLD,), lambda m: m.style & m.concept),
        f"old: sharpness, less {whose}": difference((OLD,), lambda m: m.sharpness),
    }


def as_markdown(rows: dict[str, dict[str, Interval | str]]) -> str:
    """Rows by name -> a Markdown table."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    return markdown_table(columns, {
        name: [str(row.get(c, "")) for c in columns] for name, row in rows.items()
    })


def write_csv(path: Path, points: Sequence[Point], sets: dict[str, CaseSet]) -> None:
    """One line per picture."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([
        "method", "learning_rate", "training_seed", "step", "num_steps", "guidance", "set",
        "prompt", "noise_seed", "style", "concept", "sharpness", "copying",
    ])
    for p in points:
        for name, m in p.sets.items():
            rows = sets[name].rows
            for i, caption in enumerate(rows.captions):
                writer.writerow([
                    p.method, p.rate, p.seed, p.step, p.num_steps, p.guidance, name, caption,
                    int(rows.seeds[i]), int(m.style[i]), int(m.concept[i]),
                    f"{m.sharpness[i]:.3f}", f"{m.copying[i]:.4f}",
                ])
    write_atomic(path, out.getvalue())
