"""Rows of a batch that teach nothing new: prompts on which the student is to stay as it was.

They have no picture. The student follows its own trajectory on them as on any row, and its only
teacher is the untuned model with the same prompt (`method.rollout.Retention`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dopsd_jax.core.files import lfs_advice, split_paths
from dopsd_jax.data.batches import BatchPlan, BatchRows, permutation
from dopsd_jax.data.files import DataError

_KEPT = 4  # first word of the keys of random numbers; data/batches.py has those before it


def kept_rows(batch_size: int, keep_share: float) -> int:
    """How many rows of a batch keep.

    Raises:
        ValueError: A share of the batch that is no whole number of rows.
    """
    count = round(batch_size * keep_share)
    if abs(count - batch_size * keep_share) > 1e-6 * batch_size:
        nearest = max(count, 1) / batch_size
        raise ValueError(
            f"keep_share: expected a share that is a whole number of the batch's {batch_size} "
            f"rows, such as {nearest:g}, got {keep_share:g}; a larger batch_size (with "
            "accumulation, so that memory stays as it is) allows finer shares"
        )
    return count


def read_prompts(path: str | Path, name: str = "keep_prompts") -> tuple[str, ...]:
    """The prompts of a text file, one in each line that is not blank, in order.

    Args:
        path: The file.
        name: Of the key or flag that names it, for errors.

    Raises:
        DataError: Missing, not UTF-8, or without a prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{name}: expected a text file with a prompt in each line, found "
                        f"none at {path}")
    if advice := lfs_advice(path):
        raise DataError(f"{name}: {path}: {advice}")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise DataError(f"{name}: {path}: expected UTF-8 text, byte {e.start} is not") from e
    prompts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise DataError(f"{name}: {path}: expected a prompt in each line, found none")
    return prompts


def read_kept(paths: str) -> tuple[tuple[str, ...], ...]:
    """The prompts of each of several text files, as the key keep_prompts names them.

    Args:
        paths: The files, separated by commas.

    Raises:
        DataError: As `read_prompts`, of any of them; nothing between commas; a file that is named
            twice.
    """
    try:
        files = split_paths(paths)
    except ValueError as e:
        raise DataError(f"keep_prompts: {e}") from None
    if twice := sorted({path for path in files if files.count(path) > 1}):
        raise DataError(f"keep_prompts: expected every file once, got {', '.join(twice)} twice")
    return tuple(read_prompts(path) for path in files)


def all_prompts(kept: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The prompts of all files, each once."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(kept)))


def fingerprint(kept: Sequence[Sequence[str]]) -> str:
    """SHA-256 of the prompts of files, in their order; where they are kept says nothing."""
    named = kept if len(kept) > 1 else kept[0]
    return hashlib.sha256(json.dumps([*named]).encode()).hexdigest()


class PlanWithKept:
    """The batches of a run whose last rows keep; the others are those of a plan of their own.

    Files take turns, so that each has as many rows as any other, however many prompts it holds.
    Those of a file take turns like rows of data: an endless stream, one permutation after the
    other.

    Args:
        plan: Of the rows of data: as many in each batch as do not keep, and one where all do.
        kept: The prompts of each file, at least one.
        batch_size: Rows per global batch, those that keep included.
        count: How many keep.
        seed: Of the run.
    """

    def __init__(
        self, plan: BatchPlan, kept: Sequence[Sequence[str]], *, batch_size: int, count: int,
        seed: int,
    ):
        self._plan, self._kept, self._seed = plan, tuple(map(tuple, kept)), seed
        self._batch_size, self._count = batch_size, count
        # A run walks through epochs in order: the last two of each file are all it asks for.
        self._order = functools.lru_cache(maxsize=2 * len(kept))(self._shuffle)

    def at(self, step: int) -> BatchRows:
        """The global batch of a step.

        A row that keeps holds a row of data besides: its bucket and what the teacher would see
        have the shapes of the batch, and count for nothing.
        """
        batch = self._plan.at(step)
        learned = self._batch_size - self._count
        beside = [i % len(batch.rows) for i in range(self._count)]
        batch = batch.take([*range(learned), *beside])
        kept = [self._prompt(step * self._count + i) for i in range(self._count)]
        return BatchRows(
            batch.bucket, batch.rows, batch.caption_keys, ("",) * learned + tuple(kept)
        )

    def epochs(self, step: int) -> float:
        """How often the average row of data was seen in the first `step` steps."""
        return self._plan.epochs(step) if self._count < self._batch_size else 0.0

    def _prompt(self, position: int) -> str:
        turn, file = divmod(position, len(self._kept))
        epoch, offset = divmod(turn, len(self._kept[file]))
        return self._kept[file][int(self._order(file, epoch)[offset])]

    def _shuffle(self, file: int, epoch: int) -> np.ndarray:
        # The first file's order is that of a run with this file alone.
        key = (epoch, file) if file else (epoch,)
        return permutation(len(self._kept[file]), self._seed, _KEPT, *key)
