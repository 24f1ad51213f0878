"""Rows of a batch that teach nothing new: prompts on which the student is to stay as it was.

They have no picture. The student walks on them as on any row, and its only teacher is the untuned
model with the same prompt (`method.rollout.Retention`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dopsd_jax.core.files import lfs_advice
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


def fingerprint(prompts: Sequence[str]) -> str:
    """SHA-256 of prompts in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


class PlanWithKept:
    """The batches of a run whose last rows keep; the others are those of a plan of their own.

    Prompts take turns like rows of data: an endless stream, one permutation after the other.

    Args:
        plan: Of the rows of data: as many in each batch as do not keep, and one where all do.
        prompts: At least one.
        batch_size: Rows per global batch, those that keep included.
        count: How many keep.
        seed: Of the run.
    """

    def __init__(
        self, plan: BatchPlan, prompts: Sequence[str], *, batch_size: int, count: int, seed: int
    ):
        self._plan, self._prompts, self._seed = plan, tuple(prompts), seed
        self._batch_size, self._count = batch_size, count
        # A run walks through epochs in order: the last two are all that is asked for.
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

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
        epoch, offset = divmod(position, len(self._prompts))
        return self._prompts[int(self._order(epoch)[offset])]

    def _shuffle(self, epoch: int) -> np.ndarray:
        return permutation(len(self._prompts), self._seed, _KEPT, epoch)
