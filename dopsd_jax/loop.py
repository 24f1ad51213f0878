"""The loop of a run: steps, numbers, checkpoints, pictures, resume and stop, for any objective."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.core.log import log
from dopsd_jax.core.metrics import Metrics, Progress, save_curves


class TrainingError(RuntimeError):
    """A run that cannot go on: its numbers are no longer finite."""


class State(Protocol):
    """What the loop reads of a train state, which may be any pytree with these two leaves."""

    step: jax.Array
    rng: jax.Array


S = TypeVar("S", bound=State)


@dataclasses.dataclass
class Task:
    """What the loop needs of an objective.

    Attributes:
        state: State at step 0, placed on the devices; of no use to the caller afterwards.
        step_fn: (state, batch) -> state, metrics; jitted, state donated. Metrics must have
            "loss" and may have "grad_norm", which stop the run when not finite; every name is
            logged, scalars and vectors alike.
        make_batch: (step, state.rng) -> batch on the devices; a function of these alone, so that
            a resumed run sees the same batches.
        preview: (step, state, metrics) draws samples/*.png and may log them with
            `metrics.image`; None: no pictures.
        epochs: Step -> epochs done, logged; None: not logged.
    """

    state: S
    step_fn: Callable[[S, Any], tuple[S, dict[str, jax.Array]]]
    make_batch: Callable[[int, jax.Array], Any]
    preview: Callable[[int, S, Metrics], None] | None = None
    epochs: Callable[[int], float] | None = None


class Stopper:
    """Remembers SIGTERM (and a first Ctrl-C), so that the loop can save before it ends."""

    def __init__(self):
        self.signal: str | None = None
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        del frame
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def check_finite(step: int, metrics: dict[str, np.ndarray], checkpoints: Checkpoints) -> None:
    """Stops the run at the first loss or gradient that is not a number."""
    bad = [k for k in ("loss", "grad_norm") if k in metrics and not np.isfinite(metrics[k])]
    if bad:
        checkpoints.wait()
        raise TrainingError(
            f"step {step}: {' and '.join(f'{k} = {metrics[k]}' for k in bad)}; nothing after the "
            f"checkpoint of step {checkpoints.latest_step()} is kept. Lower learning_rate, or "
            "try dtype=float32 to tell overflow from divergence"
        )


def run(config: ConfigDict, workdir: str | Path, task: Task) -> State:
    """Runs a task to config.num_train_steps, resuming from the workdir's latest checkpoint.

    Writes metrics.jsonl, tensorboard/, checkpoints/ and curves.png. The metrics writer is made
    here, because it must know the step resumed from, and handed to `task.preview`.

    Args:
        config: num_train_steps, batch_size, log_every, sample_every (0: never),
            checkpoint_every, keep_checkpoints.
        workdir: The run's directory, already claimed.
        task: The objective.

    Returns:
        The last state.

    Raises:
        ValueError: The checkpoint is of another structure or shape.
        TrainingError: The loss or gradient is not finite; the last good checkpoint stays.
    """
    workdir, total = Path(workdir), config.num_train_steps
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
    state = task.state
    if checkpoints.latest_step() is not None:
        state, meta = checkpoints.restore(state)
        epochs = "" if task.epochs is None else f", {task.epochs(meta['step']):.2f} epochs"
        log.info("resumed at step %d of %d%s", meta["step"], total, epochs)
    start = int(state.step)
    metrics = Metrics(workdir, start)
    progress = Progress(total, start, config.batch_size)

    def save(step: int) -> None:
        checkpoints.save(step, state, {"step": step, "rows_seen": step * config.batch_size})

    def draw(step: int) -> None:
        if task.preview is not None:
            task.preview(step, state, metrics)

    def settle(pending) -> None:
        """Fetches a finished step's numbers; they are looked at one step late, so that the
        device already works on the next one."""
        if pending is None:
            return
        step, values = pending[0], jax.tree.map(np.asarray, pending[1])
        check_finite(step, values, checkpoints)
        row = values | {"images_per_second": progress.images_per_second(step)}
        if task.epochs is not None:
            row["epochs"] = task.epochs(step)
        metrics.scalars(step, row)
        shown = {k.replace("_", " "): values[k] for k in ("loss", "grad_norm") if k in values}
        progress.update(step, shown, line=step % config.log_every == 0 or step == total)

    stopper, pending = Stopper(), None
    if start == 0 and config.sample_every:
        draw(0)
    progress.start_clock(start)
    try:
        for step in range(start, total):
            state, values = task.step_fn(state, task.make_batch(step, state.rng))
            settle(pending)
            pending = (step + 1, values)
            if step == start:
                jax.block_until_ready(values)
                progress.start_clock(step + 1)
            last = step + 1 == total
            stopping = stopper.signal is not None
            if last or stopping or (step + 1) % config.checkpoint_every == 0:
                settle(pending)  # never save a state whose numbers have not been looked at
                pending = None
                save(step + 1)
            if config.sample_every and (last or (step + 1) % config.sample_every == 0):
                settle(pending)
                pending = None
                draw(step + 1)
            if stopping and not last:
                log.info(
                    "%s: saved step %d; run the same command again to continue",
                    stopper.signal, step + 1,
                )
                break
    finally:
        stopper.restore()
        progress.close()
        metrics.close()
        checkpoints.close()
    save_curves(workdir)
    return state
