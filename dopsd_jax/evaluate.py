"""Command: methods compared on the same pictures, noise and budget, or own runs, with intervals.

    python -m dopsd_jax.evaluate --config configs/mini_claim.py --workdir runs/claim
    python -m dopsd_jax.evaluate --config configs/mini_claim.py --workdir runs/mine \
        --config.checkpoints=runs/a,runs/b

Every method is trained at every learning rate and measured on its way. What is compared is
retention, the share of old prompts still drawn right, at **matched accuracy in the new style**: of
each method the point that retains most among those that reach config.new_style. That rate and step
is repeated with more training seeds. Whatever is done already is not done again.

Then the methods are tuned on pictures of the model's own training world, which separates what is
lost of the few-step ability from what is forgotten for the new style.

Writes <workdir>/report.html, and what it is made of: table.md, curves.png and grid.png; and
pictures.csv, a line per picture.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from dopsd_jax import report
from dopsd_jax.compare import runs as runs_lib
from dopsd_jax.compare import table as table_lib
from dopsd_jax.compare.command import begin, define_flags
from dopsd_jax.compare.measures import (
    NEW_UNSEEN,
    OLD,
    OTHER_NOISE,
    Bench,
    Measured,
    case_sets,
    read_arrays,
    training_pictures,
    write_arrays,
)
from dopsd_jax.compare.runs import Run
from dopsd_jax.compare.table import Point
from dopsd_jax.core import cli, trees
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import log
from dopsd_jax.mini import drawing, judge
from dopsd_jax.mini.build import write_trained
from dopsd_jax.mini.emoji import load_sprites
from dopsd_jax.run import loras, previews
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.pipeline import load_pipeline
from dopsd_jax.weights.shipped import JUDGE

CONTROL_GUIDANCE, CONTROL_STEPS = 2.5, 12
GRID_ROWS = 6
OTHER = "untuned, other noise"


class Evaluation:
    """The pictures of every run, measured once and kept in <workdir>/measured.

    Args:
        config: See configs/mini_claim.py.
        workdir: Where everything goes.
        data: Folder of the pictures that the runs learn from, as `mini.build --style` writes it.
    """

    def __init__(self, config: ConfigDict, workdir: Path, data: Path):
        self.config, self.workdir = config, workdir
        self._pipe = load_pipeline("mini", dtype="float32", remat="none")
        _, tuned = training_pictures(data)
        self.labels = labels = judge.read(str(JUDGE)).labels
        if config.prompts:
            old = drawing.read_cases(labels, config.prompts)
        else:
            old = drawing.draw_cases(labels, config.old_prompts, seed=7)
        self.sets = case_sets(labels, config.style, tuned, old=old, seeds=config.generation_seeds)
        self.bench = Bench(self._pipe, self.sets, JUDGE, data)

    def variables(self, run: Run | None, step: int) -> trees.Tree:
        """The student's weights; of no run the untuned model's."""
        if run is None:
            return {"params": self._pipe.params}
        tree, spec = workdir_lib.read_lora(run.workdir, step=step)
        members = [((tree, spec.scale), run.strength), *run.besides]
        return {"params": self._pipe.params, "lora": loras.take_loras(members, self._pipe)}

    def point(self, run: Run | None, step: int, *, num_steps: int, guidance: float = 1.0,
              shift: int = 0) -> Point:
        """One run at one step, drawn and judged, or read from where that was kept."""
        name = "untuned" if run is None else f"{run.name}-{step}"
        asked = [caption for s in self.sets.values() for caption in s.rows.captions]
        contents = [] if run is None else [str(run.workdir.resolve()), *(
            (run.workdir / name).read_text() for name in ("config.json", "identity.json")
        )]
        if run is not None and (run.strength, run.besides) != (1.0, ()):
            contents += [repr(run.strength), *(
                f"{loras.fingerprint(n.path)} x {n.strength!r}" for n in run.besides
            )]
        drawn = hashlib.sha256("\n".join([*asked, *contents]).encode())
        file = self.workdir / "measured" / (
            f"{name}-{num_steps}steps-x{guidance:g}-noise{shift}-{drawn.hexdigest()[:8]}.npz"
        )
        if file.is_file():
            sets = {n: Measured(**fields) for n, fields in read_arrays(file).items()}
        else:
            sets = self.bench.measure(
                self.variables(run, step), num_steps=num_steps, guidance=guidance, shift=shift
            )
            write_arrays(file, {n: dataclasses.asdict(m) for n, m in sets.items()})
        method, rate, seed = ("untuned", 0.0, 0) if run is None else (
            run.method, run.rate, run.seed
        )
        found = Point(method, rate, seed, step, num_steps, guidance, sets)
        log.info("%s, step %d, %d steps: new style %.3f, old prompts %.3f", name, step, num_steps,
                 found.new_style(), found.retention())
        return found


def sweep(evaluation: Evaluation) -> dict[str, list[Point]]:
    """Every method at every rate, measured along the way; all start at the untuned model."""
    c, workdir = evaluation.config, evaluation.workdir
    rates = dict.fromkeys(c.methods, tuple(c.learning_rates))
    untuned = evaluation.point(None, 0, num_steps=c.num_steps)
    found: dict[str, list[Point]] = {method: [untuned] for method in c.methods}
    runs = runs_lib.planned(c, workdir / "runs", rates=rates, seeds=(0,))
    runs_lib.train_all(c, runs)
    for run in runs:
        for step in range(c.measure_every, c.num_train_steps + 1, c.measure_every):
            found[run.method].append(evaluation.point(run, step, num_steps=c.num_steps))
    return found


def repeated(evaluation: Evaluation, chosen: dict[str, Point]) -> dict[str, list[tuple[Run, int]]]:
    """The chosen rate and step of every method, trained with all seeds."""
    c, found = evaluation.config, {}
    for method, point in chosen.items():
        if point.step == 0:
            found[method] = [(None, 0)]
            continue
        runs = runs_lib.planned(c, evaluation.workdir / "runs", rates={method: (point.rate,)},
                                seeds=tuple(range(c.training_seeds)))
        found[method] = [(run, point.step) for run in runs]
    runs_lib.train_all(c, [run for members in found.values() for run, _ in members if run])
    return found


def own(runs: Sequence[Run]) -> dict[str, list[tuple[Run, int]]]:
    """The latest checkpoint of every own run."""
    found = {}
    for run in runs:
        saved = workdir_lib.saved_steps(run.workdir)
        if not saved:
            raise ValueError(f"no checkpoint yet in {run.workdir}/checkpoints")
        found[run.method] = [(run, saved[-1])]
    return found


def table_of(
    evaluation: Evaluation, compared: dict[str, list[tuple[Run, int]]], num_steps: int,
    guidance: float = 1.0,
) -> tuple[str, list[Point]]:
    """All methods drawn in one way: a Markdown table, and the points in it.

    The row "other noise" is the untuned model drawn a second time: what no difference looks like.
    """
    def drawn(run: Run | None, step: int, **how) -> Point:
        return evaluation.point(run, step, num_steps=num_steps, guidance=guidance, **how)

    base = drawn(None, 0)
    members = {"untuned": [base], OTHER: [drawn(None, 0, shift=OTHER_NOISE)]}
    for method, runs in compared.items():
        run, step = runs[0]
        label = f"{method} ({f'{run.rate:g}, {step} updates' if run else 'no update'})"
        members[label] = [drawn(run, step) for run, step in runs]
    real = evaluation.bench.real[evaluation.config.style]
    first = list(members)[2]
    rows = {}
    for label, points in members.items():
        rows[label] = table_lib.row_of(points, evaluation.sets, base, real)
        if label != "untuned":
            rows[label]["old: both, less untuned's"] = table_lib.paired(
                points, [base], evaluation.sets
            )
        if label not in (first, "untuned", OTHER):
            rows[label] |= table_lib.beside(
                points, members[first], evaluation.sets, f"{next(iter(compared))}'s"
            )
    extra = f", guidance {guidance:g}" if guidance != 1 else ""
    text = f"### {num_steps} steps{extra}\n\n{table_lib.as_markdown(rows)}"
    del members[OTHER]
    return text, [p for points in members.values() for p in points]


def tables(
    evaluation: Evaluation, compared: dict[str, list[tuple[Run, int]]]
) -> tuple[str, list[Point]]:
    """A table per way of drawing, and all points in them; of the controls, one training seed."""
    few = evaluation.config.num_steps
    samplers = [(few, 1.0), (2 * few, 1.0), (CONTROL_STEPS, 1.0), (few, CONTROL_GUIDANCE)]
    text, every = [], []
    for num_steps, guidance in samplers:
        controls = num_steps > 2 * few or guidance != 1
        shown = compared if not controls else {m: r[:1] for m, r in compared.items()}
        table, points = table_of(evaluation, shown, num_steps, guidance)
        text.append(table)
        every += points
    return "\n".join(text), every


def same_data(evaluation: Evaluation) -> str:
    """Methods tuned on pictures like those the model was trained on: a Markdown table.

    There is nothing new in them to learn and nothing to forget for it. What gets worse in few
    steps and not in many is the few-step ability itself.
    """
    c, workdir = evaluation.config, evaluation.workdir / "same_data"
    pictures = workdir / "pictures"
    if len(list(pictures.glob("*.txt"))) < c.same_data_pictures:
        write_trained(
            load_sprites(), pictures, evaluation.labels, c.same_data_pictures, seed=0
        )
    tuned = runs_lib.planned(
        c, workdir, rates=dict.fromkeys(c.same_data_methods, (c.same_data_rate,)), seeds=(0,),
        data=str(pictures),
    )
    runs_lib.train_all(c, tuned)
    real, rows = evaluation.bench.real["trained"], {}
    for run in [None, *tuned]:
        row = {}
        for num_steps in (c.num_steps, 2 * c.num_steps, CONTROL_STEPS):
            before = evaluation.point(None, 0, num_steps=num_steps)
            now = evaluation.point(run, c.num_train_steps if run else 0, num_steps=num_steps)
            row |= table_lib.few_step_row(now, before, evaluation.sets, real)
        rows["untuned" if run is None else f"{run.method} ({run.rate:g})"] = row
    return (
        f"### Tuned on {c.same_data_pictures} pictures of the model's own training world, "
        f"{c.num_train_steps} updates\n\n{table_lib.as_markdown(rows)}"
    )


def draw_curves(path: Path, found: dict[str, list[Point]], level: float) -> None:
    """Retention and sharpness of old prompts against accuracy in the new style.

    A line per method and rate, from the untuned model on.
    """
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    heights = {
        "old prompts drawn right (style and things)": lambda p, _: p.retention(),
        "sharpness of old prompts / the untuned model's": Point.old_sharpness,
    }
    for ax, (words, height) in zip(panels, heights.items(), strict=True):
        for i, (method, points) in enumerate(found.items()):
            label = method
            for rate in dict.fromkeys(p.rate for p in points[1:]):
                line = [points[0], *(p for p in points if p.rate == rate)]
                across, up = zip(*((p.new_style(), height(p, line[0])) for p in line), strict=True)
                ax.plot(across, up, "o-", color=f"C{i}", lw=0.8, ms=5, alpha=0.8, label=label)
                label = None
        ax.axvline(level, color="black", lw=0.7, ls=":", label="compared to the right of this")
        ax.set_xlabel("style accuracy on prompts of the new style")
        ax.set_ylabel(words)
        ax.grid(alpha=0.3)
    panels[0].legend(loc="lower left")
    figure.savefig(path, dpi=100)


def draw_grid(evaluation: Evaluation, compared: dict[str, list[tuple[Run, int]]]) -> np.ndarray:
    """Prompts of the new style, then old ones, by every method, each row from one noise."""
    c = evaluation.config
    columns = []
    for method, members in {"untuned": [(None, 0)], **compared}.items():
        variables = evaluation.variables(*members[0])
        shown = [
            evaluation.bench.draw(name, variables, num_steps=c.num_steps)[
                :: c.generation_seeds][:GRID_ROWS]
            for name in (NEW_UNSEEN, OLD)
        ]
        columns.append((method, np.concatenate(shown)))
    return previews.grid(columns, enlarged=2)


def evaluate(config: ConfigDict, workdir: Path) -> str:
    """Runs a whole comparison and returns the text of its table."""
    if config.checkpoints:
        runs = runs_lib.own_runs(config.checkpoints)
        evaluation = Evaluation(config, workdir, Path(runs_lib.same_data(runs)))
    else:
        evaluation = Evaluation(config, workdir, Path(runs_lib.settings(config.run_config).data))
    judge = evaluation.bench.report
    head = [
        f"The judge is right on held-back real pictures with {judge['style']:.1%} of the styles "
        f"and {judge['concept']:.1%} of the things; two sets of real pictures are "
        f"{judge['frechet_of_two_real_sets']:.1f} apart (Frechet)."
    ]
    points: list[Point] = []
    if config.checkpoints:
        compared = own(runs)
    else:
        found = sweep(evaluation)
        chosen = {m: table_lib.best_at(points, config.new_style) for m, points in found.items()}
        short = [method for method, point in chosen.items() if point is None]
        chosen |= {method: max(found[method], key=Point.new_style) for method in short}
        compared = repeated(evaluation, chosen)
        points = [p for of_method in found.values() for p in of_method[1:]]
        draw_curves(workdir / "curves.png", found, config.new_style)
        head.append(
            f"Compared at a new-style accuracy of at least {config.new_style:g} (in the sweep, "
            "seed 0): of each method the learning rate and step that retain most."
            + "".join(f" {m} never reaches it and is shown where it comes nearest." for m in short)
        )
    text, drawn = tables(evaluation, compared)
    if config.same_data_methods and not config.checkpoints:
        text += "\n" + same_data(evaluation)
    every = {(p.method, p.rate, p.seed, p.step, p.num_steps, p.guidance): p
             for p in [*points, *drawn]}
    table_lib.write_csv(workdir / "pictures.csv", list(every.values()), evaluation.sets)
    previews.save(workdir / "grid.png", draw_grid(evaluation, compared))
    text = "\n\n".join([*head, text])
    write_atomic(workdir / report.TABLE, text)
    write_atomic(workdir / "report.html", report.evaluation_page(workdir))
    return text


def main() -> None:
    config, workdir = begin("configs/mini_claim.py", "methods", "checkpoints")
    print(evaluate(config, workdir))
    curves = "" if config.checkpoints else "curves.png, "
    print(f"\n{workdir}/report.html, {report.TABLE}, pictures.csv, {curves}grid.png")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)
