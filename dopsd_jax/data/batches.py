"""Which rows and which captions a step sees: a pure function of (seed, step, process).

Each bucket is an endless stream of its rows, one permutation after the other, cut into batches;
nothing is ever dropped. Buckets take turns in cycles that hold a number of batches in proportion
to their rows, so that every row is seen equally often. Where several data sets have weights, the
rows of a bucket are a mixture of one such stream per data set, and the cycles follow the weights.

Differs from reference: there the order is the same every epoch, incomplete batches are dropped, and
one caption kind per batch is drawn from a global generator that processes do not share.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dopsd_jax.data.buckets import Bucket

# First word of every key below, so that no two uses of the seed share random numbers.
_ROWS, _CYCLE, _CAPTIONS, _MIXTURE = range(4)
MIXTURE = 4096  # turns in which weights are rounded to whole numbers


@dataclass(frozen=True)
class BatchRows:
    """Rows of one batch, all of one bucket, with the caption each uses this time.

    Attributes:
        kept: A prompt for each row that only keeps the student as it is, see data/keeping.py, and
            "" for the others; empty where none does.
    """

    bucket: Bucket
    rows: tuple[int, ...]
    caption_keys: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def take(self, positions: Sequence[int]) -> BatchRows:
        """Some of the batch's rows."""
        return BatchRows(
            self.bucket, tuple(self.rows[i] for i in positions),
            tuple(self.caption_keys[i] for i in positions),
            tuple(self.kept[i] for i in positions) if self.kept else (),
        )


class _Turns:
    """Streams that take turns, in cycles that hold each a whole number of times, shuffled.

    Args:
        counts: How often each stream comes in a cycle.
        permutation: Cycle -> the order of its turns.
    """

    def __init__(self, counts: Sequence[int], permutation: Callable[[int], np.ndarray]):
        self._counts, self._permutation = counts, permutation
        # Cycles are walked through in order.
        self._cycle = functools.lru_cache(maxsize=2)(self._shuffle)

    def at(self, position: int) -> tuple[int, int]:
        """Whose turn a position is, and how many turns of that stream came before."""
        cycle, position = divmod(position, sum(self._counts))
        order, turn = self._cycle(cycle)
        index = int(order[position])
        return index, cycle * self._counts[index] + int(turn[position])

    def _shuffle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Per position of one cycle: index of its stream, and that stream's turns before it."""
        order = np.repeat(np.arange(len(self._counts), dtype=np.int32), self._counts)
        order = order[self._permutation(cycle)]
        turn = np.empty(len(order), np.int64)
        for index, turns in enumerate(self._counts):
            turn[order == index] = np.arange(turns)
        return order, turn


class BatchPlan:
    """The batches of a run, by step, in any order.

    Args:
        assignment: Rows by bucket, from `assign_buckets`.
        captions: Row -> its caption keys.
        batch_size: Rows per global batch.
        seed: Non-negative.
        sizes: Rows of each data set, one after the other; None: all are one.
        weights: Share of the pictures that come from each data set, of any sum.
    """

    def __init__(
        self,
        assignment: Mapping[Bucket, Sequence[int]],
        captions: Callable[[int], Sequence[str]],
        *,
        batch_size: int,
        seed: int,
        sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ):
        if batch_size < 1 or seed < 0:
            raise ValueError(f"expected batch_size >= 1 and seed >= 0, got {batch_size} and {seed}")
        if not assignment or not all(len(rows) for rows in assignment.values()):
            raise ValueError("expected at least one bucket, and rows in each, got an empty one")
        self._buckets = tuple(assignment)
        members = [np.asarray(rows, np.int64) for rows in assignment.values()]
        self._captions, self._batch_size, self._seed = captions, batch_size, seed
        self._num_rows = sum(map(len, members))
        if weights is None:
            self._rows = [[rows] for rows in members]
            shared = math.gcd(*map(len, members))
            counts = [len(rows) // shared for rows in members]
            shares = [[1] for _ in members]
        else:
            first = np.cumsum([0, *sizes])
            self._rows = [
                [rows[(rows >= a) & (rows < b)] for a, b in itertools.pairwise(first)]
                for rows in members
            ]
            # As often as rows count, which may be more than once.
            counted = [sum(map(len, of_set)) for of_set in zip(*self._rows, strict=True)]
            parts = [
                [w * len(part) / n for part, w, n in zip(parts, weights, counted, strict=True)]
                for parts in self._rows
            ]
            counts = whole_shares([sum(of_bucket) for of_bucket in parts])
            shares = [whole_shares(of_bucket) for of_bucket in parts]
        self._bucket_turns = _Turns(
            counts, lambda cycle: self._permutation(sum(counts), _CYCLE, cycle)
        )
        self._mixtures = [
            _Turns(of_bucket, functools.partial(self._shuffle_mixture, index, sum(of_bucket)))
            for index, of_bucket in enumerate(shares)
        ]
        # A run walks through epochs in order: the last few are all that is asked for.
        streams = sum(map(len, self._rows))
        self._epoch = functools.lru_cache(maxsize=streams + 1)(self._shuffle_epoch)

    def at(self, step: int) -> BatchRows:
        """The global batch of a step."""
        if step < 0:
            raise ValueError(f"expected step >= 0, got {step}")
        index, batch = self._bucket_turns.at(step)  # of this bucket's stream
        first = batch * self._batch_size
        rows = tuple(self._row(index, first + i) for i in range(self._batch_size))
        draws = _random(self._batch_size, self._seed, _CAPTIONS, step)
        keys = [self._captions(row) for row in rows]
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

    def _row(self, index: int, position: int) -> int:
        """The row at a position of a bucket's endless stream."""
        part = 0
        if len(self._rows[index]) > 1:
            part, position = self._mixtures[index].at(position)
        epoch, offset = divmod(position, len(self._rows[index][part]))
        return int(self._epoch(index, part, epoch)[offset])

    def _shuffle_epoch(self, index: int, part: int, epoch: int) -> np.ndarray:
        """A bucket's rows of a data set in the order of one epoch."""
        bucket, rows = self._buckets[index], self._rows[index]
        beside = (bucket.references,) if bucket.references or len(rows) > 1 else ()
        of_part = (part,) if len(rows) > 1 else ()
        return rows[part][self._permutation(
            len(rows[part]), _ROWS, bucket.width, bucket.height, epoch, *beside, *of_part
        )]

    def _shuffle_mixture(self, index: int, size: int, cycle: int) -> np.ndarray:
        bucket = self._buckets[index]
        return self._permutation(
            size, _MIXTURE, bucket.width, bucket.height, bucket.references, cycle
        )

    def _permutation(self, size: int, *key: int) -> np.ndarray:
        return permutation(size, self._seed, *key)


def permutation(size: int, seed: int, *key: int) -> np.ndarray:
    """int64 [size], a pure function of the seed and the key."""
    # NumPy promises stable bits from Philox, but not from Generator.permutation: sorting raw bits
    # keeps a resumed run's order across NumPy versions.
    return np.argsort(_random(size, seed, *key), kind="stable")


def _random(size: int, seed: int, *key: int) -> np.ndarray:
    """uint64 [size], a pure function of the seed and the key."""
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(size)


def whole_shares(shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `shares`, to within 1 in MIXTURE; what is above 0 stays so."""
    total = sum(shares)
    found = [max(round(share / total * MIXTURE), 1) if share else 0 for share in shares]
    shared = math.gcd(*found)
    return [count // shared for count in found]
