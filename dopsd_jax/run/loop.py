"""The loop of a run: steps, numbers, checkpoints, pictures, resume and stop, for any objective."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.core import cli, distributed, memory, mirror
from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import log
from dopsd_jax.core.metrics import Metrics, NoMetrics, Progress, save_curves
from dopsd_jax.core.sharding import fetch


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
        state: State at step 0, placed on the devices. It is given up, as what step_fn is called
            with: run() frees its arrays, so hold no other use of them.
        step_fn: (state, batch) -> state, metrics; jitted, state donated. Metrics must have
            "loss" and may have "grad_norm", which stop the run when not finite; every name is
            logged, scalars and vectors alike.
        make_batch: (step, state.rng) -> batch on the devices; a function of these alone, so that
            a resumed run sees the same batches.
        preview: (step, state, metrics) draws samples/*.png and may log them with
            `metrics.image`; called in every process, of which only the first may write; None: no
            pictures.
        epochs: Step -> epochs done, logged; None: not logged.
        ending: (state before an update, its number) -> the same state, perhaps with an end brought
            forward, and the number of the last update; None: it is config.num_train_steps.
        trackers: Names of the trackers that get the run's numbers and pictures.
    """

    state: S
    step_fn: Callable[[S, Any], tuple[S, dict[str, jax.Array]]]
    make_batch: Callable[[int, jax.Array], Any]
    preview: Callable[[int, S, Metrics], None] | None = None
    epochs: Callable[[int], float] | None = None
    ending: Callable[[S, int], tuple[S, int]] | None = None
    trackers: Sequence[str] = ()


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
        last = checkpoints.latest_step()
        kept = ("no checkpoint was saved yet" if last is None
                else f"nothing after the checkpoint of step {last} is kept")
        raise TrainingError(
            f"step {step}: {' and '.join(f'{k} = {metrics[k]}' for k in bad)}; {kept}. "
            "Lower learning_rate, or try dtype=float32 to tell overflow from divergence"
        )


def _last_drawn(workdir: Path) -> int:
    """The last step whose preview is complete; -1: none."""
    file = workdir / "samples" / ".last"
    text = file.read_text(errors="replace") if file.is_file() else "-1"
    try:
        return int(text)
    except ValueError as e:
        raise ValueError(
            f"{file}: expected the step of the last pictures, found {text!r:.40}; delete that file "
            "to have them drawn again"
        ) from e


def _draws_at(config: ConfigDict, step: int, last: int) -> bool:
    """Whether a run whose last update is `last` draws after `step`."""
    every = config.sample_every
    return every > 0 and (step == last or step % every == 0)


def finished(config: ConfigDict, workdir: str | Path) -> bool:
    """Whether the run has nothing left to do; says so. Needs neither weights nor a device.

    A task without preview must have sample_every = 0: its last picture would be waited for.
    """
    # Agreed: a process that goes on makes what another would still look for.
    step = _finished_step(config, Path(workdir))
    if distributed.any_process(step is None):
        return False
    log.info("already finished: step %d of %d", step, config.num_train_steps)
    return True


def _finished_step(config: ConfigDict, workdir: Path) -> int | None:
    """The last step, if nothing is left to do."""
    if not mirror.checkpoints_of(workdir).is_dir():
        return None
    checkpoints = Checkpoints(mirror.checkpoints_of(workdir), read_only=True)
    step = checkpoints.latest_step()
    checkpoints.close()
    if step is None or step < config.num_train_steps:
        return None
    draws = _draws_at(config, step, config.num_train_steps)
    return None if draws and _last_drawn(workdir) < step else step


def _restore(checkpoints: Checkpoints, task: Task, total: int) -> State:
    """The latest checkpoint's state, or the fresh one where there is none."""
    if checkpoints.latest_step() is None:
        return task.state
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), task.state
    )
    for leaf in jax.tree.leaves(task.state):
        leaf.delete()  # two states may not fit
    state, meta = checkpoints.restore(like)
    epochs = "" if task.epochs is None else f", {task.epochs(meta['step']):.2f} epochs"
    log.info("resumed at step %d of %d%s", meta["step"], total, epochs)
    return state


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
    with contextlib.ExitStack() as at_end:  # whatever ends the run, the last named first
        main = distributed.is_main()
        bucket = mirror.mirror_of(workdir) if main else None
        if bucket is not None:
            at_end.callback(bucket.push, now=True)
        checkpoints = Checkpoints(
            mirror.checkpoints_of(workdir), keep=config.keep_checkpoints
        )
        at_end.callback(checkpoints.close)
        state = _restore(checkpoints, task, total)
        start = int(state.step)
        if main and config.sample_every > 0 and _last_drawn(workdir) > start:
            # Of an update that is done again, with its rows and pictures: the mark comes back too.
            write_atomic(workdir / "samples" / ".last", str(start))
        # A process killed between a checkpoint and its picture owes the picture.
        owed = distributed.any_process(
            _draws_at(config, start, total) and (start == 0 or _last_drawn(workdir) < start)
        )
        metrics = Metrics(
            workdir, start, redraws=owed, trackers=task.trackers, settings=cli.config_keys(config)
        ) if main else NoMetrics()
        if main:
            at_end.callback(save_curves, workdir)
        at_end.push(lambda error, *_: metrics.close(failed=error is not None))
        progress = Progress(total, start, config.batch_size)
        at_end.callback(progress.close)
        stopper = Stopper()
        at_end.callback(stopper.restore)
        vote = distributed.Vote()

        def draw(step: int) -> None:
            if task.preview is not None:
                task.preview(step, state, metrics)
                if main:
                    metrics.flush()  # before the mark below says that all of it is written
                    (workdir / "samples").mkdir(exist_ok=True)
                    write_atomic(workdir / "samples" / ".last", str(step))

        def settle(step: int, values, *, timed: bool) -> None:
            """Fetches a finished step's numbers, checks and logs them."""
            values = fetch(values)
            check_finite(step, values, checkpoints)
            if step == start + 1:
                memory.log_devices("the first update is done")
            if timed:
                progress.lap()
            else:
                progress.restart()
            row = dict(values)
            if progress.images_per_second is not None:
                row["images_per_second"] = progress.images_per_second
            if task.epochs is not None:
                row["epochs"] = task.epochs(step)
            metrics.scalars(step, row)
            shown = {k.replace("_", " "): values[k] for k in ("loss", "grad_norm") if k in values}
            progress.update(step, shown, line=step % config.log_every == 0 or step == total)

        if owed:
            draw(start)
            memory.log_devices("the first previews are drawn")
        progress.restart()
        pending, compiled, step = None, set(), start
        while step < total:
            step += 1
            if task.ending is not None:
                state, total = task.ending(state, step)
                progress.total = total
            batch = task.make_batch(step - 1, state.rng)
            shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))
            compiles = shapes not in compiled
            compiled.add(shapes)
            state, values = task.step_fn(state, batch)
            # Numbers are looked at one step late, so that the device already works on the next
            # one; but at once after compiling, and before a save: nothing is saved unseen.
            if pending is not None:
                settle(*pending, timed=not compiles)
            pending = (step, values)
            stopping = vote(stopper.signal is not None)
            saves = step == total or stopping or step % config.checkpoint_every == 0
            draws = _draws_at(config, step, total)
            if compiles or saves or draws:
                settle(*pending, timed=not compiles)
                pending = None
            if saves:
                metrics.flush()  # a checkpoint's own numbers are not written again
                checkpoints.save(step, state, {"step": step, "rows_seen": step * config.batch_size})
            if draws:
                draw(step)
            if bucket is not None:
                bucket.push(now=saves or draws)
            if saves or draws:
                progress.restart()
            if stopping and step < total:
                log.info(
                    "%s: saved step %d; run the same command again to continue",
                    stopper.signal or "stopped with another process", step,
                )
                break
    return state
