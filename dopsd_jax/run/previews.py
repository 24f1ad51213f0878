"""Grids of pictures: base, student and teacher on the same noise, and their trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dopsd_jax.core.files import new_sibling

GAP = 4
HEADER = 16


def grid(columns: Sequence[tuple[str, np.ndarray]], enlarged: int = 1) -> np.ndarray:
    """Labelled columns of pictures.

    Args:
        columns: (label, uint8 [B, H, W, 3]) each, all of the same B; sizes may differ.
        enlarged: Every pixel becomes a square of so many.

    Returns:
        uint8 [height, width, 3].
    """
    columns = [(name, p.repeat(enlarged, 1).repeat(enlarged, 2)) for name, p in columns]
    count = len(columns[0][1])
    height = max(p.shape[1] for _, p in columns)
    width = sum(p.shape[2] + GAP for _, p in columns) + GAP
    canvas = Image.new("RGB", (width, HEADER + count * (height + GAP) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    x = GAP
    for label, pictures in columns:
        if len(pictures) != count:
            raise ValueError(f"column {label!r}: expected {count} pictures, got {len(pictures)}")
        draw.text((x, 2), label, fill="black")
        for row, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (x, HEADER + row * (height + GAP)))
        x += pictures.shape[2] + GAP
    return np.asarray(canvas)


def columns_of(picture: np.ndarray, count: int, first: int, last: int) -> np.ndarray:
    """A part of a grid that has `count` columns: those from `first` to `last`, with their labels.

    All pictures of a grid must be of one width.
    """
    step = (picture.shape[1] - GAP) // count
    return picture[:, first * step:(last + 1) * step + GAP]


def column_of(picture: np.ndarray, count: int, column: int, rows: int) -> list[np.ndarray]:
    """The single pictures of a column of a grid of `count` columns, from top to bottom."""
    width, height = (picture.shape[1] - GAP) // count, (picture.shape[0] - HEADER - GAP) // rows
    part = picture[HEADER:, column * width + GAP:(column + 1) * width]
    return [part[row * height:(row + 1) * height - GAP] for row in range(rows)]


def save(path: str | Path, pixels: np.ndarray) -> Path:
    """Writes a PNG, whole or not at all."""
    path = Path(path)
    with new_sibling(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="png")
        temporary.replace(path)
    return path
