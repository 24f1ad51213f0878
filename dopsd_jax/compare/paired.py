"""Two sides drawn from the same prompts and noise: paired differences, and the pairs that moved."""

from __future__ import annotations

import csv
import dataclasses
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dopsd_jax.compare.metric_weights import METRICS
from dopsd_jax.compare.stats import mean_interval
from dopsd_jax.compare.table import as_markdown
from dopsd_jax.core.files import write_atomic
from dopsd_jax.data.images import read_image

SHARPNESS = "sharpness"  # needs no weights
MEANINGS = {name: metric.meaning for name, metric in METRICS.items()} | {
    SHARPNESS: "mean absolute Laplacian in levels of 255; falls where few-step ability is lost",
}
THUMBNAIL, TEXT_WIDTH, GAP, LINE = 256, 300, 6, 13  # pixels of the contact sheet


@dataclasses.dataclass(frozen=True)
class Measured:
    """One metric of all pairs.

    Attributes:
        base, tuned: float64 [prompts, seeds]; base is None where the metric compares a tuned
            picture with its base picture.
    """

    base: np.ndarray | None
    tuned: np.ndarray

    @property
    def change(self) -> np.ndarray:
        """What tuning changed, [prompts, seeds]."""
        return self.tuned if self.base is None else self.tuned - self.base


def summaries(measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Metric -> means, and 95% intervals by the bootstrap over prompts as {value, low, high}.

    The interval of a single prompt is None.
    """
    found = {}
    for name, m in measured.items():
        if m.base is None:
            found[name] = {"tuned to base": _interval(m.tuned)}
            continue
        higher = (m.change > 0) + 0.5 * (m.change == 0)
        found[name] = {
            "base": float(m.base.mean()), "tuned": float(m.tuned.mean()),
            "difference": _interval(m.change), "tuned higher in": _interval(higher),
        }
    return found


def _interval(values: np.ndarray) -> dict[str, float | None]:
    if len(values) < 2:
        return {"value": float(values.mean()), "low": None, "high": None}
    return dataclasses.asdict(mean_interval(values))


def as_tables(found: Mapping[str, Mapping[str, Any]]) -> str:
    """`summaries` as Markdown: both sides by each metric, then how far one is from the other."""
    both, between = {}, {}
    for name, row in found.items():
        if "difference" not in row:
            nearer = "higher" if METRICS[name].higher_is_better else "lower"
            between[name] = {"nearer": nearer, "tuned to base": _in_words(row["tuned to base"]),
                             "what": MEANINGS[name]}
            continue
        both[name] = {
            "base": f"{row['base']:.4f}", "tuned": f"{row['tuned']:.4f}",
            "tuned - base": _in_words(row["difference"], sign="+"),
            "tuned higher in": _in_words(row["tuned higher in"], digits=3),
            "what": MEANINGS[name],
        }
    return "\n".join(as_markdown(rows) for rows in (both, between) if rows)


def _in_words(found: Mapping[str, float | None], *, sign: str = "", digits: int = 4) -> str:
    value, low, high = (
        None if x is None else f"{round(x, digits) + 0.0:{sign}.{digits}f}"
        for x in (found["value"], found["low"], found["high"])
    )
    return f"{value} (no interval of 1 prompt)" if low is None else f"{value} [{low}, {high}]"


def moved(measured: Mapping[str, Measured]) -> np.ndarray:
    """How far each pair moved, [prompts, seeds]: the mean over metrics of the size of the change,
    as a multiple of its root mean square over all pairs. Metrics to the base count by distance."""
    sizes = []
    for name, m in measured.items():
        change = m.change
        if m.base is None and METRICS[name].higher_is_better:
            change = 1.0 - change  # a cosine, 1 for equal pictures
        spread = float(np.sqrt(np.mean(change**2)))
        sizes.append(np.abs(change) / spread if spread > 0 else np.zeros_like(change))
    return np.mean(sizes, axis=0)


def write_csv(
    path: Path, measured: Mapping[str, Measured], prompts: Sequence[str], seeds: Sequence[int]
) -> None:
    """One line per pair."""
    out = io.StringIO()
    writer = csv.writer(out)
    columns = [c for name, m in measured.items()
               for c in ([f"{name}_to_base"] if m.base is None else [f"{name}_base",
                                                                     f"{name}_tuned"])]
    writer.writerow(["prompt", "seed", *columns])
    for i, prompt in enumerate(prompts):
        for j, seed in enumerate(seeds):
            sides = (x for m in measured.values() for x in (m.base, m.tuned) if x is not None)
            writer.writerow([prompt, seed, *(f"{x[i, j]:.6f}" for x in sides)])
    write_atomic(path, out.getvalue())


def figures(measured: Mapping[str, Measured], i: int, j: int) -> list[str]:
    """A line for each metric of one pair: prompt i, seed j."""
    return [
        f"{name} to base {m.tuned[i, j]:.4g}" if m.base is None else
        f"{name} {m.base[i, j]:.4g} to {m.tuned[i, j]:.4g}"
        for name, m in measured.items()
    ]


def _at_hand(picture: Image.Image) -> Image.Image:
    """At most THUMBNAIL pixels wide and high; of a small one every pixel becomes a square."""
    times = THUMBNAIL // max(picture.size)
    if times > 1:
        return picture.resize([times * side for side in picture.size], Image.Resampling.NEAREST)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return picture


def contact_sheet(rows: Sequence[tuple[Path, Path, str, Sequence[str]]]) -> np.ndarray:
    """Pairs of pictures below each other, base on the left, with words beside them.

    Args:
        rows: Base file, tuned file, prompt, further lines; of each pair.

    Returns:
        uint8 [height, width, 3]; no picture is wider or higher than THUMBNAIL pixels.
    """
    shown = []
    for base, tuned, prompt, lines in rows:
        pictures = [_at_hand(read_image(file)) for file in (base, tuned)]
        # Prompts in other scripts have no shapes in PIL's own font.
        words = textwrap.wrap(prompt.encode("latin-1", "replace").decode("latin-1"), 48)
        shown.append((pictures, [*words[:6], *(["..."] if len(words) > 6 else []), "", *lines]))
    left = max(p.width for pictures, _ in shown for p in pictures)
    heights = [max(*(p.height for p in pictures), LINE * len(text)) for pictures, text in shown]
    size = (2 * left + TEXT_WIDTH + 4 * GAP, sum(heights) + GAP * (len(shown) + 1) + LINE)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    columns = (GAP, left + 2 * GAP, 2 * left + 3 * GAP)
    for x, label in zip(columns, ("base", "tuned"), strict=False):
        draw.text((x, 2), label, fill="black")
    y = LINE + GAP
    for (pictures, text), height in zip(shown, heights, strict=True):
        for x, picture in zip(columns, pictures, strict=False):
            canvas.paste(picture, (x, y))
        for k, line in enumerate(text):
            draw.text((columns[2], y + LINE * k), line, fill="black")
        y += height + GAP
    return np.asarray(canvas)


