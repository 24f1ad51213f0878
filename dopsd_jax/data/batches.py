"""Which rows and which captions a step sees: a pure function of (seed, step, process).

Each bucket is an endless stream of its rows, one permutation after the other, cut into batches;
nothing is ever dropped. Buckets take turns in cycles that hold a number of batches in proportion
to their rows, so that every row is seen equally often.

Differs from reference: there the order is the same every epoch, incomplete batches are dropped, and
one caption kind per batch is drawn from a global generator that processes do not share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dopsd_jax.data.buckets import Bucket

# First word of every key below, so that no two uses of the seed share random numbers.
_ROWS, _CYCLE, _CAPTIONS = range(3)


@dataclass(frozen=True)
class BatchRows:
    """Rows of one batch, all of one bucket, with the caption each uses this time."""

    bucket: Bucket
    rows: tuple[int, ...]
    caption_keys: tuple[str, ...]

    def take(self, positions: Sequence[int]) -> BatchRows:
        """Some of the batch's rows."""
        return BatchRows(
            self.bucket, tuple(self.rows[i] for i in positions),
            tuple(self.caption_keys[i] for i in positions),
        )


class BatchPlan:
    """The batches of a run, by step, in any order.

    Args:
        assignment: Rows by bucket, from `assign_buckets`.
        captions: Caption keys of every row.
        batch_size: Rows per global batch.
        seed: Non-negative.
    """

    def __init__(
        self,
        assignment: Mapping[Bucket, Sequence[int]],
        captions: Sequence[Sequence[str]],
        *,
        batch_size: int,
        seed: int,
    ):
        if batch_size < 1 or seed < 0:
            raise ValueError(f"expected batch_size >= 1 and seed >= 0, got {batch_size} and {seed}")
        if not assignment or not all(len(rows) for rows in assignment.values()):
            raise ValueError("expected at least one bucket, and rows in each, got an empty one")
        self._buckets = tuple(assignment)
        self._rows = [np.asarray(rows, np.int64) for rows in assignment.values()]
        self._captions = captions
        self._batch_size = batch_size
        self._seed = seed
        self._num_rows = sum(map(len, self._rows))
        shared = math.gcd(*map(len, self._rows))
        self._turns = [len(rows) // shared for rows in self._rows]  # batches of a bucket per cycle
        # A run walks through epochs and cycles in order: the last few are all that is asked for.
        self._epoch = functools.lru_cache(maxsize=len(self._rows) + 1)(self._shuffle_epoch)
        self._cycle = functools.lru_cache(maxsize=2)(self._shuffle_cycle)

    def at(self, step: int) -> BatchRows:
        """The global batch of a step."""
        if step < 0:
            raise ValueError(f"expected step >= 0, got {step}")
        cycle, position = divmod(step, sum(self._turns))
        order, turn = self._cycle(cycle)
        index = int(order[position])
        batch = cycle * self._turns[index] + int(turn[position])  # of this bucket's stream
        rows = self._stream(index, batch * self._batch_size, (batch + 1) * self._batch_size)
        draws = self._random(self._batch_size, _CAPTIONS, step)
        keys = [self._captions[row] for row in rows]
        chosen = tuple(k[int(draw) % len(k)] for k, draw in zip(keys, draws, strict=True))
        return BatchRows(self._buckets[index], rows, chosen)

    def local(self, step: int, process: int, processes: int) -> BatchRows:
        """One process's contiguous share of the global batch.

        Raises:
            ValueError: The batch does not divide by the processes, or there is no such process.
        """
        if self._batch_size % processes or not 0 <= process < processes:
            raise ValueError(
                f"expected a batch_size that is a multiple of the {processes} processes and a "
                f"process in [0, {processes}), got batch_size {self._batch_size}, process {process}"
            )
        share = self._batch_size // processes
        mine = slice(process * share, (process + 1) * share)
        batch = self.at(step)
        return BatchRows(batch.bucket, batch.rows[mine], batch.caption_keys[mine])

    def epochs(self, step: int) -> float:
        """How often the average row was seen in the first `step` steps."""
        return step * self._batch_size / self._num_rows

    def _stream(self, index: int, start: int, stop: int) -> tuple[int, ...]:
        """Rows [start, stop) of a bucket's endless stream; may span several epochs."""
        size, rows = len(self._rows[index]), []
        while start < stop:
            epoch, offset = divmod(start, size)
            rows += self._epoch(index, epoch)[offset : offset + stop - start].tolist()
            start = (epoch + 1) * size
        return tuple(rows)

    def _shuffle_epoch(self, index: int, epoch: int) -> np.ndarray:
        """A bucket's rows in the order of one epoch."""
        bucket, rows = self._buckets[index], self._rows[index]
        beside = (bucket.references,) if bucket.references else ()
        return rows[
            self._permutation(len(rows), _ROWS, bucket.width, bucket.height, epoch, *beside)
        ]

    def _shuffle_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Per position of one cycle: index of its bucket, and that bucket's batches before it."""
        order = np.repeat(np.arange(len(self._turns), dtype=np.int32), self._turns)
        order = order[self._permutation(len(order), _CYCLE, cycle)]
        turn = np.empty(len(order), np.int64)
        for index, turns in enumerate(self._turns):
            turn[order == index] = np.arange(turns)
        return order, turn

    def _permutation(self, size: int, *key: int) -> np.ndarray:
        # NumPy promises stable bits from Philox, but not from Generator.permutation: sorting raw
        # bits keeps a resumed run's order across NumPy versions.
        return np.argsort(self._random(size, *key), kind="stable")

    def _random(self, size: int, *key: int) -> np.ndarray:
        """uint64 [size], a pure function of the seed and the key."""
        return np.random.Philox(np.random.SeedSequence(self._seed, spawn_key=key)).random_raw(size)
