"""Trainings that end well when their time is over: the rate falls to 0 before the last update.

How many updates fit into a time is not known before some were done. So the optimizer's state holds
the number of the last update, which the host may bring forward while it trains; nothing is compiled
again, and a resumed run ends where it would have ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dopsd_jax.core.log import log
from dopsd_jax.method.train_step import TrainState, make_optimizer

SETTLING = 20  # updates whose time does not count: programs are compiled and caches filled


class EndingState(NamedTuple):
    """State of an optimizer with an end.

    Attributes:
        count: int32, updates done.
        last: int32, number of the last update.
        decay: int32, over how many updates before it the rate falls.
        inner: State of the optimizer itself.
    """

    count: jax.Array
    last: jax.Array
    decay: jax.Array
    inner: Any


def with_end(
    optimizer: optax.GradientTransformation, config: ConfigDict
) -> optax.GradientTransformation:
    """The same optimizer, its updates falling linearly to 0 over the last ones.

    Every update is the rate times something, so scaling it is scaling the rate.

    Args:
        optimizer: Of a constant rate.
        config: Of the stage; its num_train_steps and optimizer.decay_steps hold until the host
            brings them forward.
    """
    def init(params):
        last, decay = (
            jnp.asarray(n, jnp.int32)
            for n in (config.num_train_steps, config.optimizer.decay_steps)
        )
        return EndingState(jnp.zeros((), jnp.int32), last, decay, optimizer.init(params))

    def update(grads, state, params=None):
        updates, inner = optimizer.update(grads, state.inner, params)
        scale = jnp.clip((state.last - state.count) / jnp.maximum(state.decay, 1), 0.0, 1.0)
        updates = jax.tree.map(lambda u: u * scale, updates)
        return updates, state._replace(count=state.count + 1, inner=inner)

    return optax.GradientTransformation(init, update)


def optimizer_of(
    config: ConfigDict, stacks: Sequence[str] = (), rate: float = 1.0
) -> optax.GradientTransformation:
    """The optimizer of a stage's config, its learning rate times `rate`, without its end."""
    settings = config.optimizer.to_dict()
    settings["learning_rate"] *= rate
    del settings["decay_steps"]
    return make_optimizer(**settings, stacks=stacks)


def ended(state: TrainState) -> bool:
    """Whether a training has done its last update."""
    return int(state.step) >= int(state.opt_state.last)


class Deadline:
    """Brings the end of a training forward so that it is over in time; see `loop.Task.ending`.

    Args:
        config: Of the stage: `seconds` that its updates may take from now on (0: no limit), and the
            share of updates over which the rate falls, `optimizer.decay_steps / num_train_steps`,
            whatever their number.
        clock: In seconds.
    """

    def __init__(self, config: ConfigDict, clock: Callable[[], float] = time.monotonic):
        self._clock, self._start, self._seconds = clock, clock(), config.seconds
        self._share = config.optimizer.decay_steps / config.num_train_steps
        self._last, self._first = config.num_train_steps, None
        self._decided = not config.seconds

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """The state before update `step`, and the number of the last update now."""
        if self._first is None:
            planned, self._first = self._last, step
            self._last = int(state.opt_state.last)
            self._decided |= self._last < planned  # by an earlier process
        if self._decided:
            return state, self._last
        now, done = self._clock(), step - self._first
        if done == SETTLING:
            self._settled = now
        if done < 2 * SETTLING:
            return state, self._last
        each = (now - self._settled) / (done - SETTLING)
        left = (self._start + self._seconds - now) / each  # updates that still fit
        possible = step - 1 + max(left, 1)
        decay = max(int(self._share * possible), 1)
        if possible >= self._last or left > decay:
            return state, self._last
        self._decided, self._last = True, step - 1 + max(int(left), 1)
        log.info("the time allows %d updates; the rate falls from here on", self._last)
        ending = state.opt_state._replace(last=jnp.int32(self._last), decay=jnp.int32(decay))
        return state.replace(opt_state=ending), self._last
