"""Figures of sequences of tasks -> what methods learned and kept, with intervals.

Average accuracy and backward transfer as Lopez-Paz and Ranzato define them (arXiv 1706.08840): the
mean over tasks after the last one, and the mean gain of earlier tasks since they were learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dopsd_jax.compare.measures import OLD
from dopsd_jax.compare.sequences import Measured, Trial, Trials
from dopsd_jax.compare.stats import Interval, crossed_interval
from dopsd_jax.core.markdown import markdown_table


@dataclasses.dataclass(frozen=True)
class Results:
    """The measurements of one method; noises of a prompt are averaged.

    T tasks, C things of each style, N old prompts.

    Attributes:
        position: int [orders, T]: when each style was learned, counted from 0.
        style, thing: float [seeds, orders, T, T, C]: share drawn right after task i of the style
            with number j; nan where it was not learned yet.
        old, sharpness, drift: float [seeds, orders, T, N]: after task i, of old prompts the share
            drawn right (style and things), sharpness, and the difference to the untuned picture.
    """

    position: np.ndarray
    style: np.ndarray
    thing: np.ndarray
    old: np.ndarray
    sharpness: np.ndarray
    drift: np.ndarray

    def at_end(self, values: np.ndarray) -> np.ndarray:
        """[seeds, orders, T, ..] -> after the last task, orders averaged, [seeds, cases]."""
        last = values[:, :, -1].mean(1)
        return last.reshape(len(last), -1)

    def learned(self, values: np.ndarray) -> np.ndarray:
        """Of `style` or `thing`: right after each style's own task, [seeds, orders, T, C]."""
        count = self.position.shape[1]
        return np.stack([
            values[:, o, self.position[o], np.arange(count)] for o in range(len(self.position))
        ], axis=1)

    def transfer(self, values: np.ndarray) -> np.ndarray:
        """What earlier tasks gained since they were learned, [seeds, cases].

        Of every style in the orders in which it is not the last; a style that always is has none.
        """
        gain = values[:, :, -1] - self.learned(values)
        count = self.position.shape[1]
        earlier = np.broadcast_to((self.position < count - 1)[None, :, :, None], gain.shape)
        sometimes = (self.position < count - 1).any(0)
        gain, earlier = gain[:, :, sometimes], earlier[:, :, sometimes]
        mean = np.where(earlier, gain, 0).sum(1) / earlier.sum(1)
        return mean.reshape(len(mean), -1)


def results(trials: Trials, by_order: Sequence[Sequence[Trial]]) -> Results:
    """What the trials of one method drew, [orders][seeds]."""
    styles = trials.styles
    count, orders, seeds = len(styles), len(by_order), len(by_order[0])

    def mean(name: str, values: np.ndarray) -> np.ndarray:
        return trials.sets[name].by_case(values).mean(1)

    things = [trials.sets[s].cases for s in styles]
    style = np.full((seeds, orders, count, count, min(things)), np.nan)
    thing, old = style.copy(), np.zeros((seeds, orders, count, trials.sets[OLD].cases))
    sharpness, drift = old.copy(), old.copy()
    for o, in_order in enumerate(by_order):
        for s, trial in enumerate(in_order):
            for i in range(count):
                found = trials.measured(trial, i + 1)
                for name in trial.styles[: i + 1]:
                    j = styles.index(name)
                    style[s, o, i, j] = mean(name, found[name]["style"])[: min(things)]
                    thing[s, o, i, j] = mean(name, found[name]["concept"])[: min(things)]
                old[s, o, i] = mean(OLD, found[OLD]["style"] & found[OLD]["concept"])
                sharpness[s, o, i] = mean(OLD, found[OLD]["sharpness"])
                drift[s, o, i] = mean(OLD, found[OLD]["drift"])
    position = np.array([[in_order[0].styles.index(s) for s in styles] for in_order in by_order])
    return Results(position, style, thing, old, sharpness, drift)


def summary(found: Results) -> dict[str, float]:
    """By which a learning rate is chosen: accuracy right after each task, and old prompts."""
    return {"learned": float(found.learned(found.style).mean()),
            "old": float(found.at_end(found.old).mean())}


def by_task(found: Results) -> dict[str, np.ndarray]:
    """Title -> [trainings, T]: after each task, means over all that was learned so far."""
    def flat(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, values.shape[2])

    return {
        "old prompts drawn right (style and things)": flat(found.old.mean(-1)),
        "sharpness of old prompts, levels of 255": flat(found.sharpness.mean(-1)),
        "style accuracy of all styles learned so far": flat(np.nanmean(found.style, (-1, -2))),
    }


def mean_of(values: np.ndarray) -> Interval:
    """Interval of a mean over [seeds, cases]."""
    return crossed_interval(lambda s, c: values[s][:, c].mean(), *values.shape)


def ratio_of(values: np.ndarray, untuned: np.ndarray) -> Interval:
    """Interval of the mean of [seeds, cases] over that of [cases], case by case."""
    return crossed_interval(lambda s, c: values[s][:, c].mean() / untuned[c].mean(), *values.shape)


def as_text(
    trials: Trials, found: Mapping[str, Results], rates: Mapping[str, float], short: Sequence[str]
) -> str:
    """The tables of a comparison, and how they were made, in Markdown."""
    c, said = trials.config, trials.report
    count, things = len(c.orders[0]), min(trials.sets[s].cases for s in trials.styles)
    lines = [
        f"{count} styles one after another, {c.pictures} pictures and {c.num_train_steps} updates "
        f"each, carry {c.carry}; {len(c.orders)} orders, {c.training_seeds} training seeds, none "
        f"of which chose a rate. Drawn in {c.num_steps} steps: of each style {things} "
        f"things that no picture shows, and {c.old_prompts} old prompts, {c.generation_seeds} "
        "noises of each. 95% intervals over seeds and prompts together. The judge is right on "
        f"held-back real pictures with {said['style']:.1%} of the styles and "
        f"{said['concept']:.1%} of the things.",
        f"Learning rates: of those that reach {c.new_style:g} right after each task, the one that "
        "keeps most of the old prompts."
        + "".join(f" {m} never does, and is shown where it learns most." for m in short),
        "### After all tasks\n\n" + _table(trials, found, rates),
        "### Style accuracy after all tasks, by style\n\n" + _styles(trials, found),
    ]
    return "\n\n".join(lines)


def _table(trials: Trials, found: Mapping[str, Results], rates: Mapping[str, float]) -> str:
    untuned = {name: _old(trials, trials.measured(None), name) for name in ("right", "sharpness")}
    first = next(iter(found))
    rows = {}
    for method, r in found.items():
        rows[f"{method} ({rates[method]:g})"] = {
            "style": mean_of(r.at_end(r.style)),
            "thing": mean_of(r.at_end(r.thing)),
            "style, right after its task": mean_of(
                r.learned(r.style).mean(1).reshape(len(r.style), -1)
            ),
            "backward transfer (style)": mean_of(r.transfer(r.style)) if r.position.shape[1] > 1
            else "",
            "old prompts right": mean_of(r.at_end(r.old)),
            "the same / untuned's": ratio_of(r.at_end(r.old), untuned["right"]),
            f"the same, less {first}'s": "" if method == first else mean_of(
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


def _old(trials: Trials, measured: Measured, name: str) -> np.ndarray:
    of = measured[OLD]
    values = of["style"] & of["concept"] if name == "right" else of[name]
    return trials.sets[OLD].by_case(values).mean(1)


def _styles(trials: Trials, found: Mapping[str, Results]) -> str:
    """A column for each style; the teacher is the untuned model shown a real picture of it."""
    untuned, rows = trials.measured(None), {}
    rows["untuned"] = [f"{untuned[s]['style'].mean():.3f}" for s in trials.styles]
    taught = trials.taught()
    rows["teacher"] = [f"{taught[s]['style'].mean():.3f}" for s in trials.styles]
    rows["teacher: thing"] = [f"{taught[s]['concept'].mean():.3f}" for s in trials.styles]
    for method, r in found.items():
        for label, values in ((method, r.style), (f"{method}: thing", r.thing)):
            last = values[:, :, -1].mean((0, 1, 3))
            rows[label] = [f"{x:.3f}" for x in last]
    return markdown_table(trials.styles, rows)
