"""Before a run: does the teacher know more than the student, and can it draw at all?

A student is no better than its teacher. So both draw the run's own pictures first, from the same
noise and with the untrained weights: the student from the prompt, the teacher from all that it
sees. What the teacher has ahead is what a run can teach; what it does wrong the student will copy.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import special

from dopsd_jax.core.files import write_atomic
from dopsd_jax.run import gauges

FILE = "preflight.json"
MIN_GAIN = 0.05      # of the student's distance, below which there is nothing to teach
MIN_SHARPNESS = 0.6  # of the targets', below which the teacher itself fails at these few steps
MAX_CAST = 12.0      # levels of 255
ZOOMS = (0.8, 0.9, 1.0, 1.1, 1.25)
MIN_ALIKE = 0.7
SIDE = 32            # pixels per side at which zoom and shift are looked for


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What was found.

    Attributes:
        student_style, teacher_style: Mean `gauges.style_distance` to the targets, levels of 255.
        student_distance, teacher_distance: Mean `gauges.distance`, which counts places too.
        gain: Share of the student's style distance that the teacher saves.
        gain_low, gain_high: Its 95% interval over pictures (Student's t, paired).
        teacher_sharpness, student_sharpness: Ratio to the targets'.
        zoom: Of the teacher's pictures against the targets, median; 1 is none.
        shift: (x, y), shares of the sides, median.
        cast: (red, green, blue), mean of teacher less target, levels of 255.
        pictures: How many.
    """

    student_style: float
    teacher_style: float
    student_distance: float
    teacher_distance: float
    gain: float
    gain_low: float
    gain_high: float
    teacher_sharpness: float
    student_sharpness: float
    zoom: float
    shift: tuple[float, float]
    cast: tuple[float, float, float]
    pictures: int

    @property
    def teaches(self) -> bool:
        """Whether the teacher is ahead by more than chance and more than MIN_GAIN."""
        return self.gain_low > 0 and self.gain >= MIN_GAIN

    def words(self) -> list[str]:
        """The findings as sentences, the verdict first."""
        by = f"{self.gain:.0%} [{self.gain_low:.0%}, {self.gain_high:.0%}]"
        if self.teaches:
            said = [f"the teacher is nearer to your pictures than the student by {by}"]
        elif self.gain_high < MIN_GAIN:
            said = [
                f"THE TEACHER HAS NOTHING TO TEACH: it is nearer to your pictures by {by}; shown "
                "them, this model draws as without them. Look at samples/preflight.png; try other "
                "captions or another recipe"
            ]
        else:
            said = [
                f"not clear whether the teacher has anything to teach: nearer to your pictures by "
                f"{by} with {self.pictures} of them; look at samples/preflight.png"
            ]
        if self.teacher_sharpness < MIN_SHARPNESS:
            said.append(
                f"the teacher's own pictures are blurred ({self.teacher_sharpness:.2f} of the "
                "targets' sharpness) and the student will copy that; try more sample_steps"
            )
        if abs(self.zoom - 1) >= 0.1 or max(map(abs, self.shift)) >= 0.06:
            said.append(
                f"the teacher draws the targets at {self.zoom:g} of their size, moved by "
                f"{self.shift[0]:+.0%} across and {self.shift[1]:+.0%} down; the student will too"
            )
        if max(map(abs, self.cast)) >= MAX_CAST:
            red, green, blue = self.cast
            said.append(
                f"the teacher's colours are off by {red:+.0f} red, {green:+.0f} green, "
                f"{blue:+.0f} blue of 255; the student's will be too"
            )
        return said


def compare(student: np.ndarray, teacher: np.ndarray, targets: np.ndarray) -> Preflight:
    """Pictures of one noise against the targets, all uint8 [N, H, W, 3] with N of at least 2.

    Raises:
        ValueError: Fewer than 2 pictures.
    """
    count = len(targets)
    if count < 2:
        raise ValueError(f"preflight: expected at least 2 pictures, got {count}")
    styles = [gauges.style_distance(p, targets) for p in (student, teacher)]
    places = [gauges.distance(p, targets).mean() for p in (student, teacher)]
    saved = (styles[0] - styles[1]) / max(styles[0].mean(), 1e-6)
    half = special.stdtrit(count - 1, 0.975) * saved.std(ddof=1) / np.sqrt(count)
    sharp = [
        float(gauges.sharpness(p).mean() / max(gauges.sharpness(targets).mean(), 1e-6))
        for p in (teacher, student)
    ]
    placed = np.array([framing(t, r) for t, r in zip(teacher, targets, strict=True)])
    zoom, across, down = np.median(placed, axis=0)
    cast = (teacher.astype(np.float32) - targets).mean((0, 1, 2))
    return Preflight(
        float(styles[0].mean()), float(styles[1].mean()), float(places[0]), float(places[1]),
        float(saved.mean()), float(saved.mean() - half), float(saved.mean() + half), *sharp,
        float(zoom), (float(across), float(down)), tuple(map(float, cast)), count,
    )


def framing(picture: np.ndarray, target: np.ndarray) -> tuple[float, float, float]:
    """The zoom and shift of the target that is most like the picture.

    Args:
        picture, target: uint8 [H, W, 3].

    Returns:
        zoom, and shift across and down as shares of the sides: a picture that shows the target's
        things larger has a zoom above 1. No change where none makes them alike (a correlation of
        MIN_ALIKE), or clearly more alike than they are.
    """
    grey = _standard(_grey(picture, SIDE))
    as_is = _alike(grey, _standard(_grey(target, SIDE)))
    best = (max(as_is + 0.02, MIN_ALIKE), 1.0, 0.0, 0.0)
    for zoom in ZOOMS:
        side = round(SIDE * zoom)
        zoomed = _grey(target, side)
        reach = range(-SIDE // 8, SIDE // 8 + 1)
        for dy in reach:
            for dx in reach:
                other = _window(zoomed, dx, dy)
                score = _alike(grey, _standard(other))
                if score > best[0]:
                    best = (score, zoom, dx / SIDE, dy / SIDE)
    return best[1:]


def _grey(image: np.ndarray, side: int) -> np.ndarray:
    small = Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def _window(zoomed: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """SIDE x SIDE pixels around the middle, what is shown moved by (dx, dy); the rim repeated."""
    corner = (len(zoomed) - SIDE) // 2
    rows = np.clip(np.arange(SIDE) + corner - dy, 0, len(zoomed) - 1)
    columns = np.clip(np.arange(SIDE) + corner - dx, 0, len(zoomed) - 1)
    return zoomed[rows][:, columns]


def _standard(grey: np.ndarray) -> np.ndarray:
    return (grey - grey.mean()) / max(grey.std(), 1e-3)


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).mean())


def write(workdir: str | Path, found: Preflight) -> None:
    """<workdir>/preflight.json, whole or not at all."""
    values: dict[str, Any] = dataclasses.asdict(found) | {
        "teaches": found.teaches, "words": found.words(),
    }
    write_atomic(Path(workdir) / FILE, json.dumps(values, indent=2) + "\n")


def read(workdir: str | Path) -> dict[str, Any]:
    """What a run's preflight found: `teaches` and `words` of its preflight.json, and its numbers.

    Raises:
        ValueError: The file is not one that a preflight wrote.
    """
    file = Path(workdir) / FILE
    try:
        found = json.loads(file.read_text(errors="replace"))
    except (json.JSONDecodeError, RecursionError):
        found = None
    words = found.get("words") if isinstance(found, dict) else None
    if (not isinstance(words, list) or not all(isinstance(w, str) for w in words)
            or not isinstance(found.get("teaches"), bool)):
        raise ValueError(
            f"{file}: expected a JSON object with teaches (true or false) and words (texts), as a "
            "preflight writes it; delete the file to go without it"
        )
    return found
