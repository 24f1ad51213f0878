"""Figures of sequences of tasks -> what methods learned and kept, with intervals.

Average accuracy and backward transfer as Lopez-Paz and Ranzato define them (arXiv 1706.08840): the
mean over tasks after the last one, and the mean gain of earlier tasks since they were learned.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from dopsd_jax.compare.measures import OLD
from dopsd_jax.compare.sequences import Measured, Trial, Trials
from dopsd_jax.compare.stats import Interval, crossed_interval
from dopsd_jax.core.markdown import markdown_table

DIFFERENCE = 0.03  # the smallest loss of old prompts that counts


@dataclasses.dataclass(frozen=True)
class Results:
    """The measurements of one method; noises of a prompt are averaged.

    R trainings, T tasks, C things of each style, N old prompts.

    Attributes:
        position: int [R, T]: when a training learned each style, counted from 0.
        style, thing: float [R, T, T, C]: share drawn right after task i of the style with number
            j; nan where it was not learned yet.
        old, sharpness, drift: float [R, T, N]: after task i, of old prompts the share drawn right
            (style and things), sharpness, and the difference to the untuned picture; nan for
            prompts that are drawn after the last task alone.
    """

    position: np.ndarray
    style: np.ndarray
    thing: np.ndarray
    old: np.ndarray
    sharpness: np.ndarray
    drift: np.ndarray

    def at_end(self, values: np.ndarray) -> np.ndarray:
        """[R, T, ..] -> after the last task, [R, cases]."""
        return values[:, -1].reshape(len(values), -1)

    def learned(self, values: np.ndarray) -> np.ndarray:
        """Of `style` or `thing`: right after each style's own task, [R, T, C]."""
        trainings, count = self.position.shape
        return values[np.arange(trainings)[:, None], self.position, np.arange(count)]

    def transfer(self, values: np.ndarray) -> np.ndarray:
        """What earlier tasks gained since they were learned, [R, cases]; nan for the last task."""
        gain = values[:, -1] - self.learned(values)
        last = self.position == self.position.shape[1] - 1
        return np.where(last[..., None], np.nan, gain).reshape(len(gain), -1)

    def by_place(self, values: np.ndarray) -> np.ndarray:
        """Of `style` or `thing`: styles in the order in which each training learned them."""
        in_order = np.argsort(self.position, axis=1)
        return np.take_along_axis(values, in_order[:, None, :, None], axis=2)


def results(trials: Trials, of_method: Sequence[Trial]) -> Results:
    """What the trials of one method drew."""
    styles, trainings = trials.styles, len(of_method)
    count, things = len(styles), min(trials.sets[s].cases for s in styles)

    def mean(name: str, values: np.ndarray) -> np.ndarray:
        return trials.by_case(name, values).mean(1)

    style = np.full((trainings, count, count, things), np.nan)
    old = np.full((trainings, count, trials.sets[OLD].cases), np.nan)
    thing, sharpness, drift = style.copy(), old.copy(), old.copy()
    for r, trial in enumerate(of_method):
        for i in range(count):
            found = trials.measured(trial, i + 1)
            for name in trial.styles[: i + 1]:
                j = styles.index(name)
                style[r, i, j] = mean(name, found[name]["style"])[:things]
                thing[r, i, j] = mean(name, found[name]["concept"])[:things]
            right = mean(OLD, found[OLD]["style"] & found[OLD]["concept"])
            old[r, i, : len(right)] = right
            sharpness[r, i, : len(right)] = mean(OLD, found[OLD]["sharpness"])
            drift[r, i, : len(right)] = mean(OLD, found[OLD]["drift"])
    position = np.array([[trial.styles.index(s) for s in styles] for trial in of_method])
    return Results(position, style, thing, old, sharpness, drift)


def summary(found: Results) -> dict[str, float]:
    """By which a learning rate is chosen: accuracy right after each task, and old prompts."""
    return {"learned": float(found.learned(found.style).mean()),
            "old": float(found.at_end(found.old).mean())}


def by_task(found: Results) -> dict[str, np.ndarray]:
    """Title -> [R, T]: after each task, means over all that was learned so far.

    Of old prompts those alone that are drawn after every task.
    """
    every = ~np.isnan(found.old).any((0, 1))
    return {
        "old prompts drawn right (style and things)": found.old[..., every].mean(-1),
        "sharpness of old prompts, levels of 255": found.sharpness[..., every].mean(-1),
        "style accuracy of all styles learned so far": np.nanmean(found.style, (-1, -2)),
    }


def mean_of(values: np.ndarray) -> Interval:
    """Interval of the mean of [R, cases], of each training without what is nan, then of all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all cases that a training has
        return crossed_interval(
            lambda s, c: np.nanmean(np.nanmean(values[s][:, c], axis=1)), *values.shape
        )


def ratio_of(values: np.ndarray, others: np.ndarray) -> Interval:
    """Interval of the mean of [R, cases] over that of [cases], case by case."""
    return crossed_interval(lambda s, c: values[s][:, c].mean() / others[c].mean(), *values.shape)


def prompts_needed(values: np.ndarray, difference: float) -> float:
    """How many prompts it takes that a mean this far from 0 is told from it, at 95%.

    The variance of a mean of R trainings and N prompts is s_R^2 / R + s_N^2 / N + s^2 / (R N);
    the parts are those of a two-way analysis of variance without repetition.

    Args:
        values: [R, N], differences of each training and prompt, at least 2 of each.
        difference: The smallest that counts.

    Returns:
        N with as many trainings; infinite where trainings alone differ by too much.
    """
    R, N = values.shape
    mean, of_training, of_prompt = values.mean(), values.mean(1), values.mean(0)
    rest = values - of_training[:, None] - of_prompt + mean
    noise = np.square(rest).sum() / ((R - 1) * (N - 1))
    trainings = max(of_training.var(ddof=1) - noise / N, 0.0)
    prompts = max(of_prompt.var(ddof=1) - noise / R, 0.0)
    left = (difference / stats.t.ppf(0.975, R - 1)) ** 2 - trainings / R
    return float(np.ceil((prompts + noise / R) / left)) if left > 0 else float("inf")


def as_text(
    trials: Trials, found: Mapping[str, Results], rates: Mapping[str, float], how: Sequence[str]
) -> str:
    """The tables of a comparison, and how they were made, in Markdown.

    Args:
        trials: Of the comparison.
        found: Method -> what it drew.
        rates: Its learning rate.
        how: Sentences that tell where the rates are from.
    """
    c, said = trials.config, trials.report
    count, things = len(c.orders[0]), min(trials.sets[s].cases for s in trials.styles)
    lines = [
        f"{count} styles one after another, {c.pictures} pictures and {c.num_train_steps} updates "
        f"each, carry {c.carry}, {c.replay_share:g} of the pictures replayed from earlier tasks, "
        f"where a method says nothing else; {c.training_seeds} training seeds, none of which chose "
        f"a rate, in {len(c.orders)} orders by turns. Drawn in {c.num_steps} steps: of each style "
        f"{things} things that no picture shows, and {c.old_prompts} old prompts, "
        f"{c.generation_seeds} noise{'s' * (c.generation_seeds > 1)} of each. 95% intervals over "
        "seeds and prompts together. The judge is right on "
        f"held-back real pictures with {said['style']:.1%} of the styles and "
        f"{said['concept']:.1%} of the things.",
        " ".join(how),
        "### After all tasks\n\n" + _table(trials, found, rates),
        _needed(trials, found),
        "### Style accuracy after all tasks, by style\n\n" + _styles(trials, found),
        "### After task i, task j\n\nAccuracy of style and of things, in the order in which each "
        f"training learned them; of old prompts the first {trials.along}, and all "
        f"{c.old_prompts} at the end.\n\n" + _matrices(found),
    ]
    return "\n\n".join(line for line in lines if line)


def _table(trials: Trials, found: Mapping[str, Results], rates: Mapping[str, float]) -> str:
    untuned = {name: _old(trials, trials.measured(None), name) for name in ("right", "sharpness")}
    taught, first, rows = _taught_right(trials), next(iter(found)), {}
    for method, r in found.items():
        rows[f"{method} ({rates[method]:g})"] = {
            "style": mean_of(r.at_end(r.style)),
            "the same / teacher's": ratio_of(r.at_end(r.style), taught),
            "thing": mean_of(r.at_end(r.thing)),
            "style, right after its task": mean_of(
                r.learned(r.style).reshape(len(r.style), -1)
            ),
            "backward transfer (style)": mean_of(r.transfer(r.style)) if r.position.shape[1] > 1
            else "",
            "old prompts right": mean_of(r.at_end(r.old)),
            "old prompts right / untuned's": ratio_of(r.at_end(r.old), untuned["right"]),
            f"old prompts right, less {first}'s": "" if method == first else mean_of(
                r.at_end(r.old) - found[first].at_end(found[first].old)
            ),
            f"style, less {first}'s": "" if method == first else mean_of(
                r.at_end(r.style) - found[first].at_end(found[first].style)
            ),
            "old: sharpness / untuned's": ratio_of(r.at_end(r.sharpness), untuned["sharpness"]),
            "old: difference to untuned": mean_of(r.at_end(r.drift)),
        }
    columns = list(next(iter(rows.values())))
    right = f"{untuned['right'].mean():.3f}"
    cells = {"untuned": [right if c == "old prompts right" else "" for c in columns]}
    return markdown_table(
        columns, cells | {name: [str(row[c]) for c in columns] for name, row in rows.items()}
    )


def _needed(trials: Trials, found: Mapping[str, Results]) -> str:
    """How many old prompts tell DIFFERENCE from nothing, by what trainings and prompts differ."""
    untuned, said = _old(trials, trials.measured(None), "right"), []
    for method, r in found.items():
        needed = prompts_needed(r.at_end(r.old) - untuned, DIFFERENCE)
        said.append(f"{method}: " + (f"{needed:,.0f}" if np.isfinite(needed) else
                                     "more trainings, whatever the prompts"))
    trainings = len(next(iter(found.values())).old)
    return (f"Old prompts with which {trainings} trainings tell a loss of {DIFFERENCE:g} of them "
            "from none, so that a 95% interval reaches as far to each side: " + "; ".join(said)
            + ".")


def _old(trials: Trials, measured: Measured, name: str) -> np.ndarray:
    of = measured[OLD]
    values = of["style"] & of["concept"] if name == "right" else of[name]
    return trials.by_case(OLD, values).mean(1)


def _taught_right(trials: Trials) -> np.ndarray:
    """Style accuracy of the teacher, [cases], in the order of `Results.at_end`."""
    taught, things = trials.taught(), min(trials.sets[s].cases for s in trials.styles)
    return np.concatenate([
        trials.by_case(s, taught[s]["style"]).mean(1)[:things] for s in trials.styles
    ])


def _styles(trials: Trials, found: Mapping[str, Results]) -> str:
    """A column for each style; the teacher is the untuned model shown a real picture of it."""
    untuned, rows = trials.measured(None), {}
    rows["untuned"] = [f"{untuned[s]['style'].mean():.3f}" for s in trials.styles]
    taught = trials.taught()
    rows["teacher"] = [f"{taught[s]['style'].mean():.3f}" for s in trials.styles]
    rows["teacher: thing"] = [f"{taught[s]['concept'].mean():.3f}" for s in trials.styles]
    for method, r in found.items():
        for label, values in ((method, r.style), (f"{method}: thing", r.thing)):
            last = values[:, -1].mean((0, 2))
            rows[label] = [f"{x:.3f}" for x in last]
    return markdown_table(trials.styles, rows)


def _matrices(found: Mapping[str, Results]) -> str:
    """Of every method a table: after task i, style and things of task j, and old prompts."""
    parts = []
    for method, r in found.items():
        style, thing = (r.by_place(x).mean((0, 3)) for x in (r.style, r.thing))
        old = np.nanmean(r.old, (0, 2))
        sharpness, drift = np.nanmean(r.sharpness, (0, 2)), np.nanmean(r.drift, (0, 2))
        count = len(old)
        columns = [*(f"task {j + 1}" for j in range(count)), "old prompts right",
                   "old: sharpness", "old: difference to untuned"]
        rows = {
            f"after task {i + 1}": [
                *("" if np.isnan(x) else f"{x:.3f}, {y:.3f}"
                  for x, y in zip(style[i], thing[i], strict=True)),
                f"{old[i]:.3f}", f"{sharpness[i]:.2f}", f"{drift[i]:.1f}",
            ] for i in range(count)
        }
        parts.append(f"{method}:\n\n{markdown_table(columns, rows)}")
    return "\n\n".join(parts)
