"""Experiment trackers beside TensorBoard: Weights & Biases and Trackio, by their own libraries.

Where a tracker sends things to is said by the library's own environment variables and logins. Each
works in a thread of its own: whatever it does, the run neither waits for it nor fails with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import queue
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import log

PROJECT = "dopsd_jax"  # where the environment names none
START_S = 300.0  # how long W&B may take to start its own process
CLOSE_S = 60.0  # how long the end of a run waits for what is not sent yet
MOST_WAITING = 20_000  # events; beyond, a tracker that hangs is given up


@dataclasses.dataclass(frozen=True)
class Event:
    """What is known of a step at once.

    Attributes:
        group: "train" or "gauges".
        step: Number of updates.
        values: By tag, the group in front: "train/loss".
        pictures: By name; uint8 [H, W, 3], or a file.
    """

    group: str
    step: int
    values: Mapping[str, float]
    pictures: Mapping[str, np.ndarray | Path] = dataclasses.field(default_factory=dict)


class Target(Protocol):
    """A run at a tracker, made from (workdir, id of an earlier start or None, settings).

    Attributes:
        id: What finds the run again.
        held: Group -> the last step that the tracker has of it; None where it does not tell.
    """

    id: str
    held: dict[str, int] | None

    def log(self, event: Event) -> None: ...

    def close(self, failed: bool) -> None: ...


class Wandb:
    """A run of Weights & Biases.

    A file of an offline run cannot be continued, so every offline start writes the whole run anew
    and puts the earlier files aside. On a server nothing can be replaced.
    """

    def __init__(self, workdir: Path, known: str | None, settings: dict[str, Any]):
        import wandb

        # A busy machine takes longer than its 30 seconds to start what sends, and nothing waits.
        given = wandb.setup(wandb.Settings(x_service_wait=START_S)).settings
        local = given.mode not in ("online", "shared")
        if not local and not wandb.login(prompt=False):
            raise ValueError("not logged in; run `wandb login` once, or set WANDB_MODE=offline")
        self._run = run = wandb.init(
            project=given.project or PROJECT, name=given.run_name or workdir.name,
            id=known or given.run_id or secrets.token_hex(4), resume="allow", config=settings,
            dir=os.environ.get("WANDB_DIR", str(workdir)),
            settings=wandb.Settings(finish_timeout=given.finish_timeout or CLOSE_S / 2),
        )
        self._picture = wandb.Image
        self.id, self.held = run.id, {} if local else None
        # W&B's own counter of rows only rises, and pictures that an interrupted run owes are of an
        # earlier step than what came last; so the axis of all charts is a value of its own.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        self._step, self._row = None, run.step - 1
        if local and run.dir:
            self._put_aside(Path(run.dir).parent)

    def _put_aside(self, mine: Path) -> None:
        for earlier in sorted(mine.parent.glob(f"offline-run-*-{self.id}")):
            if earlier.name != mine.name:
                place = mine.parent / "earlier"
                place.mkdir(exist_ok=True)
                earlier.rename(place / earlier.name)

    def log(self, event: Event) -> None:
        if event.step != self._step:
            self._step, self._row = event.step, max(event.step, self._row + 1)
        pictures = _pictures(event, self._picture)
        self._run.log({"step": event.step, **event.values, **pictures}, step=self._row)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio, in its database on this machine, on a Space or on a server of its own."""

    def __init__(self, workdir: Path, known: str | None, settings: dict[str, Any]):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        # A run is found again by its name, which other directories may have too.
        plain = re.sub(r"[^\w.-]+", "-", workdir.name)
        self.id = known or f"{plain}-{secrets.token_hex(3)}"
        local = not {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & os.environ.keys()
        database = trackio.sqlite_storage.SQLiteStorage
        if local:
            database.init_db(project)  # raises what Trackio later would only warn of, each time
        self._run = trackio.init(
            project=project, name=self.id, resume="allow", config=settings, embed=False
        )
        self._picture = trackio.Image
        self.held = None
        if local:
            self.held = _held(database.get_logs(project, self.id, run_id=self._run.id))

    def log(self, event: Event) -> None:
        self._run.log({**event.values, **_pictures(event, self._picture)}, step=event.step)

    def close(self, failed: bool) -> None:
        self._run.finish()


def _pictures(event: Event, picture: Callable[[Any], Any]) -> dict[str, Any]:
    """By tag, as a library has them; one of ours is called step, as is what they count by."""
    return {f"pictures/{name}": picture(str(x) if isinstance(x, Path) else x)
            for name, x in event.pictures.items()}


def _held(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Group -> last step, of rows with tags."""
    held: dict[str, int] = {}
    for row in rows:
        for group in {tag.partition("/")[0] for tag in row if "/" in tag}:
            held[group] = max(row["step"], held.get(group, -1))
    return held


TRACKERS: dict[str, type[Target]] = {"wandb": Wandb, "trackio": Trackio}


def parse(text: str) -> list[str]:
    """The trackers of a text such as "wandb,trackio"; may be empty.

    Raises:
        ValueError: A name that is none, or twice.
    """
    names = text.split(",") if text else []
    if not set(names) <= TRACKERS.keys() or len(set(names)) < len(names):
        raise ValueError(
            f"expected {' or '.join(TRACKERS)}, or both as wandb,trackio, got {text!r}"
        )
    return names


def check_installed(text: str) -> None:
    """Raises ValueError unless the libraries of all named trackers are installed."""
    for name in parse(text):
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"{name} is not installed; run: pip install 'dopsd_jax[{name}]' (in a clone: "
                f"pip install -e '.[{name}]')"
            )


class Tracker(threading.Thread):
    """Sends a run's events to one tracker, each once, and never fails.

    <workdir>/<name>.json says which run of the tracker belongs to the directory, and up to where
    earlier starts sent to it: what they sent stays there, and a step that is done again after a
    kill is not sent again. A tracker that tells itself what it has gets what it lacks.
    """

    def __init__(
        self, name: str, workdir: Path, settings: dict[str, Any], backlog: list[Event],
        reached: dict[str, int],
    ):
        """Starts the thread; to be called before the run's files are cut to where it resumes.

        Args:
            name: Of TRACKERS.
            workdir: The run's directory.
            settings: The run's config, flat.
            backlog: What the run's files hold of the steps that stay.
            reached: Group -> the last step that earlier starts wrote to the run's files.
        """
        super().__init__(name=name, daemon=True)
        self._workdir, self._settings, self._backlog = workdir, settings, backlog
        self._file = workdir / f"{name}.json"
        self._known, self._sent = None, {}
        if self._file.is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(self._file.read_text())
                self._known = str(entry["run"])
                self._sent = {g: max(n, int(entry["sent"].get(g, -1))) for g, n in reached.items()}
        if self._known is not None:
            self._remember(self._known)
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._failed = self._broken = False
        try:  # here: two threads that import at once may find modules that are half there
            importlib.import_module(name)
        except Exception as e:  # whatever another's package does when it is imported
            self._give_up(f"{type(e).__name__}: {e}")
        self.start()

    def _remember(self, run: str) -> None:
        write_atomic(self._file, json.dumps({"run": run, "sent": self._sent}) + "\n")

    def put(self, event: Event) -> None:
        """Takes an event, to be sent soon; returns at once."""
        if self._broken:
            return
        self._events.put(event)
        if self._events.qsize() > MOST_WAITING:
            self._give_up(f"has not taken {MOST_WAITING} events")

    def close(self, *, failed: bool) -> None:
        """Waits until all is sent, but not longer than CLOSE_S.

        Args:
            failed: Whether the run ended with an error.
        """
        self._failed = failed
        self._events.put(None)
        self.join(CLOSE_S)
        if self.is_alive() and not self._broken:
            self._give_up(f"has not taken everything within {CLOSE_S:g} seconds")

    def _give_up(self, why: str) -> None:
        self._broken = True
        log.warning("%s: %s; this run goes on without it, and has everything in metrics.jsonl, "
                    "gauges.jsonl and samples/", self.name, why)

    def run(self) -> None:
        if self._broken:
            return
        try:
            target = TRACKERS[self.name](self._workdir, self._known, self._settings)
            held = self._sent if target.held is None else target.held
            if target.id != self._known:
                self._sent = {}
                self._remember(target.id)
            waiting = iter(self._events.get, None)
            for events in (self._backlog, waiting):
                for event in events:
                    if event.step > held.get(event.group, -1):
                        target.log(event)
                    if self._broken:
                        return
            target.close(self._failed)
        except Exception as e:  # of any kind: it is another's program, and the run goes on
            if not self._broken:
                self._give_up(f"{type(e).__name__}: {e}")
