"""What a sequence of tasks kept of each of them: the matrix "after task i, task j".

Average and backward transfer as Lopez-Paz and Ranzato define them (arXiv 1706.08840): the mean of
the last row, and the mean over earlier tasks of the last row less the diagonal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dopsd_jax.core.markdown import markdown_table
from dopsd_jax.core.metrics import GAUGES, read_metrics


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Measurements of a sequence of tasks.

    Attributes:
        names: Of the tasks, in order; T of them.
        words: What is measured, and whether more or less of it is better.
        values: float [T, T]; [i, j] is of task j after task i, nan where it was not measured.
        untuned: float [T], of each task before anything was learned.
        besides: Further columns, such as what became of old prompts: name -> float [T].
        more_is_better: Of `values`.
    """

    names: tuple[str, ...]
    words: str
    values: np.ndarray
    untuned: np.ndarray
    besides: Mapping[str, np.ndarray]
    more_is_better: bool

    @property
    def average(self) -> float:
        """Mean over tasks after the last; nan if some was not measured."""
        return float(self.values[-1].mean())

    @property
    def backward_transfer(self) -> float:
        """Mean gain of earlier tasks since they were learned; below 0 they were forgotten.

        nan for a single task.
        """
        last = len(self.names) - 1
        if last == 0:
            return float("nan")
        gain = self.values[-1, :last] - np.diagonal(self.values)[:last]
        return float(gain.mean()) * (1 if self.more_is_better else -1)


def of_gauges(workdirs: Mapping[str, Path]) -> Matrix:
    """The matrix of style distances that the previews of a sequence have logged.

    Args:
        workdirs: Of each task's run, by name, in order.

    Raises:
        ValueError: A run without a gauge.
    """
    count = len(workdirs)
    values, untuned = np.full((count, count), np.nan), np.full(count, np.nan)
    besides = {"drift": np.full(count, np.nan), "sharpness_ratio": np.full(count, np.nan)}
    for i, (name, workdir) in enumerate(workdirs.items()):
        rows = read_metrics(workdir, GAUGES)
        if not rows:
            raise ValueError(f"task {name}: expected gauges in {workdir}/{GAUGES}, found none; "
                             "they are drawn with sample_every above 0")
        last = rows[-1]
        values[i, i] = last.get("style", np.nan)
        untuned[i] = last.get("untuned_style", np.nan)
        for j in range(i):
            values[i, j] = last.get(f"style_{j + 1}", np.nan)
        for column in besides:
            besides[column][i] = last.get(column, np.nan)
    return Matrix(
        tuple(workdirs), "distance in style to the task's pictures, in levels of 255; less is "
        "better", values, untuned, besides, more_is_better=False,
    )


def as_markdown(matrix: Matrix) -> str:
    """The matrix as a table, and its average and backward transfer in words."""
    def cell(value: float) -> str:
        return "" if np.isnan(value) else f"{value:.3g}"

    columns = [*matrix.names, *(name.replace("_", " ") for name in matrix.besides)]
    rows = {"untuned": [*matrix.untuned, *(np.nan for _ in matrix.besides)]}
    for i, name in enumerate(matrix.names):
        rows[f"after {name}"] = [*matrix.values[i], *(v[i] for v in matrix.besides.values())]
    table = markdown_table(columns, {name: list(map(cell, row)) for name, row in rows.items()})
    told = [f"Each column: {matrix.words}."]
    if not np.isnan(matrix.average):
        told.append(f"Average after the last task: {matrix.average:.3g}.")
    if not np.isnan(matrix.backward_transfer):
        told.append(f"Backward transfer: {matrix.backward_transfer:+.3g} (below 0: what was "
                    "learned earlier was partly lost).")
    if "drift" in matrix.besides:
        told.append("Drift and sharpness ratio are of prompts that have nothing to do with any "
                    "task, beside the untuned model's pictures on the same noise.")
    return table + "\n" + " ".join(told) + "\n"
