"""Command: methods compared over sequences of tasks, in several orders, with several seeds.

    python -m dopsd_jax.continual --config configs/mini_continual.py --workdir runs/continual

Every method learns the styles of a sequence one after another on the mini model. After each task
the pictures of all styles so far and of old prompts are judged. Learning rates are chosen by one
seed in the first order: of those that learn the styles, the one that keeps most of the old prompts.
The figures are of other seeds, which take the orders by turns. Whatever is done already is not done
again.

Writes <workdir>/report.html, and what it is made of: table.md, curves.png and grid.png.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from dopsd_jax import report
from dopsd_jax.compare import continual as figures
from dopsd_jax.compare.command import begin, define_flags
from dopsd_jax.compare.continual import Results
from dopsd_jax.compare.measures import OLD
from dopsd_jax.compare.sequences import CHOOSING, Trial, Trials
from dopsd_jax.core import cli
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import log
from dopsd_jax.run import previews

GRID_OLD = 4  # old prompts in the picture


def choose_rates(trials: Trials) -> tuple[dict[str, float], list[str]]:
    """The learning rate of every method, and sentences that tell where they are from.

    A method's own, where it has one. Otherwise, of the rates whose accuracy right after each task
    is config.new_style on average, the one that keeps most of the old prompts at the end; where
    there is none, the one that learns most.
    """
    c = trials.config
    chosen = {m: how.learning_rate for m, how in c.methods.items() if "learning_rate" in how}
    how = [f"Learning rates of {', '.join(chosen)}: as the config has them."] if chosen else []
    open_ = [m for m in c.methods if m not in chosen]
    if not open_:
        return chosen, how
    tried = trials.planned(dict.fromkeys(open_, tuple(c.learning_rates)), [CHOOSING])
    trials.train(tried)
    trials.measure(tried)
    found = {(t.method, t.rate): figures.summary(figures.results(trials, [t])) for t in tried}
    how.append(f"Learning rates{' of the others' * bool(chosen)}, by a seed of their own: of those "
               f"that reach {c.new_style:g} right after each task, the one that keeps most of the "
               "old prompts.")
    for method in open_:
        of_method = {rate: found[method, rate] for rate in c.learning_rates}
        good = {r: s for r, s in of_method.items() if s["learned"] >= c.new_style}
        if good:
            chosen[method] = max(good, key=lambda r: good[r]["old"])
        else:
            chosen[method] = max(of_method, key=lambda r: of_method[r]["learned"])
            how.append(f"{method} never does, and is shown where it learns most.")
        for rate, said in of_method.items():
            log.info("%s at %g: style right after each task %.3f, old prompts at the end %.3f%s",
                     method, rate, said["learned"], said["old"],
                     ", chosen" * (rate == chosen[method]))
    return {m: chosen[m] for m in c.methods}, how


def compared(trials: Trials, rates: dict[str, float]) -> tuple[dict[str, Results], list[Trial]]:
    """The results of every method with all seeds, and a first trial of each."""
    seeds = range(1, trials.config.training_seeds + 1)
    every = {method: trials.planned({method: [rate]}, seeds) for method, rate in rates.items()}
    # A seed of every method, then the next: what is stopped early compares all of them.
    in_turn = [t for of_seed in zip(*every.values(), strict=True) for t in of_seed]
    trials.train(in_turn)
    trials.measure(in_turn)
    found = {method: figures.results(trials, planned) for method, planned in every.items()}
    return found, [planned[0] for planned in every.values()]


def draw_curves(path: Path, found: dict[str, Results]) -> None:
    """What is kept of old prompts, and known of the styles so far, after each task.

    Bands are the standard deviation over trainings.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, 3)
    for i, (method, results) in enumerate(found.items()):
        lines = figures.by_task(results)
        for ax, values in zip(panels, lines.values(), strict=True):
            x = np.arange(1, values.shape[1] + 1)
            ax.plot(x, values.mean(0), "o-", color=f"C{i}", lw=1.5, ms=4, label=method)
            spread = values.std(0)
            ax.fill_between(x, values.mean(0) - spread, values.mean(0) + spread, color=f"C{i}",
                            alpha=0.12, lw=0)
    for ax, words in zip(panels, lines, strict=True):
        ax.set_xlabel("tasks learned (bands: standard deviation over trainings)")
        ax.set_title(words, fontsize=10)
        ax.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def draw_grid(trials: Trials, first: list[Trial]) -> np.ndarray:
    """After all tasks: a picture of each style in the order learned, then old prompts."""
    tasks = len(trials.config.orders[0])
    rows = []
    every = trials.config.generation_seeds
    chosen = dict.fromkeys(trials.config.orders[0], slice(1)) | {OLD: slice(0, GRID_OLD * every,
                                                                           every)}
    for trial in (None, *first):
        variables = trials.variables(trial, tasks)
        shown = [trials.draw(name, variables, pick) for name, pick in chosen.items()]
        rows.append(("untuned" if trial is None else trial.method, np.concatenate(shown)))
    return previews.grid(rows, enlarged=2)


def continual(config: ConfigDict, workdir: Path) -> str:
    """Runs a whole comparison and returns the text of its table."""
    trials = Trials(config, workdir)
    rates, how = choose_rates(trials)
    found, first = compared(trials, rates)
    text = figures.as_text(trials, found, rates, how)
    draw_curves(workdir / "curves.png", found)
    previews.save(workdir / "grid.png", draw_grid(trials, first))
    write_atomic(workdir / report.TABLE, text)
    write_atomic(workdir / "report.html", report.evaluation_page(workdir))
    return text


def main() -> None:
    config, workdir = begin("configs/mini_continual.py", "methods", "orders")
    print(continual(config, workdir.resolve()))
    print(f"\n{workdir}/report.html, {report.TABLE}, curves.png, grid.png")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)
