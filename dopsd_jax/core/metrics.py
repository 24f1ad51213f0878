"""Where a run's numbers go: metrics.jsonl, TensorBoard, trackers, the terminal, curves.png."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from dopsd_jax.core.checks import is_whole
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import log
from dopsd_jax.core.tensorboard import TensorBoard
from dopsd_jax.core.trackers import Event, Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS, GAUGES = "metrics.jsonl", "gauges.jsonl"
GROUPS = {METRICS: "train", GAUGES: "gauges"}  # what stands before the names of their numbers
RENAMED = {"look": "style", "teacher_look": "teacher_style"}  # what older runs wrote


class Metrics:
    """Writes scalars of a run and keeps its files true across a restart.

    metrics.jsonl has one JSON object per line, {"step": .., "loss": .., ..}, and gauges.jsonl those
    of the steps at which pictures were drawn. What will be written again is dropped at the start,
    so that every step stands in a file once.
    """

    def __init__(
        self, workdir: str | Path, resume_step: int, *, redraws: bool = False,
        trackers: Sequence[str] = (), settings: dict[str, Any] | None = None,
    ):
        """Opens the files and drops what an earlier start wrote for steps that are done again.

        Args:
            workdir: The run's directory.
            resume_step: The step of the restored checkpoint. Everything beyond it is dropped.
            redraws: Whether the pictures of `resume_step` will be drawn again. Then its gauges and
                pictures are dropped too. Its training metrics always stay: they were written
                before the checkpoint, and the step itself is not repeated.
            trackers: Names of the trackers that get the same, see core/trackers.py.
            settings: The run's config for them, flat.
        """
        workdir = Path(workdir)
        last = {METRICS: resume_step, GAUGES: resume_step - redraws}
        rows = {name: read_metrics(workdir, name) for name in GROUPS}
        kept = {name: [r for r in rows[name] if r["step"] <= last[name]] for name in GROUPS}
        reached = {GROUPS[name]: max([-1, *(r["step"] for r in rows[name])]) for name in GROUPS}
        self._trackers = [
            Tracker(name, workdir, settings or {}, _events(workdir, kept), reached)
            for name in trackers
        ]
        self._pictures: dict[int, dict[str, np.ndarray]] = {}
        self._streams = {}
        for name in GROUPS:
            file = workdir / name
            write_atomic(file, "".join(json.dumps(r) + "\n" for r in kept[name]))
            self._streams[name] = file.open("a", buffering=1)
        self._tensorboard = TensorBoard(workdir / "tensorboard", first_step=last[GAUGES] + 1)
        if redraws:  # TensorBoard hides a step as a whole, so what stays of it is written again
            for row in kept[METRICS]:
                if row["step"] == resume_step:
                    self._to_tensorboard(resume_step, _tagged(METRICS, row))

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl; arrays become lists there and name/0, name/1.. elsewhere."""
        self._write(METRICS, step, values)

    def gauges(self, step: int, values: dict[str, Any]) -> None:
        """The same of gauges.jsonl."""
        self._write(GAUGES, step, values)

    def _write(self, file: str, step: int, values: dict[str, Any]) -> None:
        row = {k: np.asarray(v).tolist() for k, v in values.items()}
        self._streams[file].write(json.dumps({"step": step, **row}) + "\n")
        tagged = _tagged(file, row)
        self._to_tensorboard(step, tagged)
        pictures = self._pictures.pop(step, {}) if file == GAUGES else {}
        self._to_trackers(Event(GROUPS[file], step, tagged, pictures))

    def _to_tensorboard(self, step: int, tagged: dict[str, float]) -> None:
        for tag, value in tagged.items():
            self._tensorboard.scalar(step, tag, value)

    def _to_trackers(self, event: Event) -> None:
        for tracker in self._trackers:
            tracker.put(event)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture [H, W, 3] uint8 for TensorBoard, and for trackers with the step's gauges."""
        self._tensorboard.image(step, name, pixels)
        if self._trackers:
            self._pictures.setdefault(step, {})[name] = pixels

    def flush(self) -> None:
        """Hands everything to the operating system, which keeps it if this process is killed."""
        for step, pictures in self._pictures.items():  # of an objective without gauges
            self._to_trackers(Event(GROUPS[GAUGES], step, {}, pictures))
        self._pictures.clear()
        for stream in self._streams.values():
            stream.flush()
        self._tensorboard.flush()

    def close(self, *, failed: bool = False) -> None:
        """Ends it all.

        Args:
            failed: Whether the run ended with an error, which trackers show.
        """
        self.flush()
        for stream in self._streams.values():
            stream.close()
        self._tensorboard.close()
        for tracker in self._trackers:
            tracker.close(failed=failed)


class NoMetrics:
    """Takes the place of `Metrics` in processes that write nothing."""

    def scalars(self, step: int, values: dict[str, Any]) -> None: ...

    def gauges(self, step: int, values: dict[str, Any]) -> None: ...

    def image(self, step: int, name: str, pixels: np.ndarray) -> None: ...

    def flush(self) -> None: ...

    def close(self, *, failed: bool = False) -> None: ...


def _tagged(file: str, row: dict[str, Any]) -> dict[str, float]:
    """{"loss": 1, "step_loss": [2, 3]} -> {"train/loss": 1, "train/step_loss/0": 2, ..}."""
    tagged = {}
    for name, value in row.items():
        tag = f"{GROUPS[file]}/{name}"
        if isinstance(value, list):
            tagged |= {f"{tag}/{i}": x for i, x in enumerate(value)}
        elif name != "step":
            tagged[tag] = value
    return tagged


def _events(workdir: Path, kept: dict[str, list[dict[str, Any]]]) -> list[Event]:
    """What a run's files hold, in the order of its steps, gauges with the pictures drawn then."""
    events = [
        Event(GROUPS[name], row["step"], _tagged(name, row), {
            file.stem.rpartition("_")[0]: file
            for file in sorted((workdir / "samples").glob(f"*_{row['step']:06d}.png"))
        } if name == GAUGES else {})
        for name in GROUPS for row in kept[name]
    ]
    return sorted(events, key=lambda event: event.step)


def read_metrics(workdir: str | Path, name: str = METRICS) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl or gauges.jsonl; a last line cut off by a crash is left out.

    Raises:
        ValueError: A line of something else.
    """
    file = Path(workdir) / name
    rows = []
    text = file.read_text(errors="replace") if file.is_file() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or not is_whole(row.get("step")):
            raise ValueError(
                f"{file}, line {number}: expected a JSON object with a whole number as step, found "
                f"{line!r:.60}; delete that line"
            )
        if wrong := [n for n, value in row.items() if not _are_numbers(value)]:
            raise ValueError(
                f"{file}, line {number}: expected a number or a list of numbers as {wrong[0]}, "
                f"found {row[wrong[0]]!r:.40}; delete that line"
            )
        rows.append({RENAMED.get(name, name): value for name, value in row.items()})
    return rows


def _are_numbers(value: Any) -> bool:
    """Whether a value is a number, NaN and infinity included, or a non-empty list of such."""
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)


def save_curves(workdir: str | Path) -> Path | None:
    """Draws every metric of the run to curves.png, loss first; None without rows."""
    figure = draw_curves(read_metrics(workdir) + read_metrics(workdir, GAUGES))
    if figure is None:
        return None
    path = Path(workdir) / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def draw_curves(rows: list[dict[str, Any]]) -> Figure | None:
    """A panel for every metric of some rows, loss first; None without any."""
    from matplotlib.figure import Figure  # only at a run's end

    names = list(dict.fromkeys(k for r in rows for k in r))
    names = [k for k in names if k not in ("step", "epochs", "images_per_second")]
    names.sort(key=lambda k: k != "loss")
    if not names:
        return None
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    width, height = 4.4 * columns, 3.6 * lines  # inches
    figure = Figure(figsize=(width, height))
    # A layout that measures every label takes as long as the drawing.
    margins = dict(left=0.6 / width, right=1 - 0.15 / width, bottom=0.5 / height,
                   top=1 - 0.35 / height, wspace=0.2, hspace=0.32)
    axes = figure.subplots(lines, columns, squeeze=False, gridspec_kw=margins)
    for ax in axes.flat[len(names):]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, names, strict=False):
        # Of another length than the latest: of another number of rollout steps, say.
        like = np.shape(next(r[name] for r in reversed(rows) if name in r))
        drawn = [r for r in rows if name in r and np.shape(r[name]) == like]
        _draw_curve(ax, name, [r["step"] for r in drawn], np.array([r[name] for r in drawn]))
    return figure


def _draw_curve(ax, name: str, steps: list[int], values: np.ndarray) -> None:
    """One metric: scalars [rows] and their running mean, or vectors [rows, parts], logarithmic."""
    if values.ndim == 1:
        ax.plot(steps, values, alpha=0.35, color="C0")
        window = max(len(values) // 20, 1)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        ax.plot(steps[window - 1:], smooth, color="C0", label=f"mean of {window}")
    else:
        for i, part in enumerate(values.T):
            ax.plot(steps, part, label=f"{i}")
        if (values > 0).any():
            ax.set_yscale("log")
    ax.legend()
    ax.set_title(name.replace("_", " "))
    ax.set_xlabel("step")
    ax.grid(alpha=0.3)


class Progress:
    """A bar with rate and time left on a terminal, plain lines in a log.

    Both count the time of steps alone: `lap` takes the time since the last `lap` or `restart` for
    one step's, `restart` leaves it out.
    """

    def __init__(self, total: int, start: int, images_per_step: int,
                 clock: Callable[[], float] = time.perf_counter):
        self.total, self._images, self._last = total, images_per_step, start
        self._clock, self._steps, self._seconds = clock, 0, 0.0
        self._mark = clock()
        # tqdm's own rate and time left count everything.
        self._bar = tqdm(
            total=total, initial=start, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
        ) if sys.stderr.isatty() and log.isEnabledFor(logging.INFO) else None

    def lap(self) -> None:
        now = self._clock()
        self._seconds += now - self._mark
        self._steps, self._mark = self._steps + 1, now

    def restart(self) -> None:
        self._mark = self._clock()

    @property
    def images_per_second(self) -> float | None:
        """None before the first lap."""
        return self._steps * self._images / self._seconds if self._seconds > 0 else None

    def seconds_left(self, step: int) -> float | None:
        """Of training after `step`; None before the first lap."""
        return (self.total - step) * self._seconds / self._steps if self._steps else None

    def update(self, step: int, values: dict[str, float], line: bool) -> None:
        text = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
        if self.images_per_second is not None:
            left = _clock(self.seconds_left(step))
            text += f", {self.images_per_second:.3g} images/s, {left} left"
        if self._bar is not None:
            self._bar.update(step - self._last)
            self._bar.set_postfix_str(text)
        elif line:
            log.info("step %d/%d: %s", step, self.total, text)
        self._last = step

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"
