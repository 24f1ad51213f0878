"""What a bucket makes of a picture, by its size alone: how far it is enlarged, how much is cut."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np

from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.datasets import Data
from dopsd_jax.data.files import DataError

MAX_ENLARGED = 2.0  # times, in each direction; beyond it little of what is learned was photographed
MAX_CUT = 0.3       # share of the picture's area; an ordinary 3:2 photograph in 16:9 loses 0.16
UNEQUAL = 20        # times as many rows in one bucket as in another


def enlarged(sizes: np.ndarray, bucket: Bucket) -> np.ndarray:
    """How many times as wide and high a picture becomes to cover its bucket; below 1 it shrinks.

    Args:
        sizes: [.., 2], width and height in pixels, above 0.
        bucket: Of all of them.

    Returns:
        float64 [..].
    """
    sizes = np.asarray(sizes, np.float64)
    return np.maximum(bucket.width / sizes[..., 0], bucket.height / sizes[..., 1])


def cut_away(sizes: np.ndarray, bucket: Bucket) -> np.ndarray:
    """Share of a picture's area that the crop to its bucket leaves out; see `enlarged`."""
    sizes = np.asarray(sizes, np.float64)
    shown = bucket.width / sizes[..., 0] * (bucket.height / sizes[..., 1])
    return 1 - shown / enlarged(sizes, bucket) ** 2


def times(factor: float) -> str:
    """An enlargement in words."""
    if factor < 1:
        return f"to {factor:.0%}"
    return f"{factor:.1f} times" if factor < 10 else f"{factor:.0f} times"


def share(part: float) -> str:
    """A share as whole percents, of which 0% and 100% are said only where they are meant."""
    if 0 < part < 0.01:
        return "less than 1%"
    return "more than 99%" if 0.99 < part < 1 else f"{part:.0%}"


def worst_shapes(data: Data) -> list[str]:
    """What sizes alone say against rows of a run: a line for each kind, with the worst row.

    No row is read but the worst; rows whose size is not known count for nothing.
    """
    sizes = data.sizes()
    factors, cuts = np.zeros(len(sizes)), np.zeros(len(sizes))
    for bucket, members in data.assignment.items():
        rows = np.unique(np.asarray(members, np.int64))
        rows = rows[sizes[rows, 0] > 0]
        factors[rows] = enlarged(sizes[rows], bucket)
        cuts[rows] = cut_away(sizes[rows], bucket)

    def worst(values: np.ndarray) -> str:
        row = int(values.argmax())
        width, height = sizes[row]
        return f"{_name(data, row)}, {width}x{height} in {data.bucket(row)}"

    lines = []
    if count := int(np.sum(factors > MAX_ENLARGED)):
        lines.append(
            f"{count} of {len(sizes)} pictures are enlarged more than {MAX_ENLARGED:g} times; the "
            f"most is {times(factors.max())} ({worst(factors)})"
        )
    if count := int(np.sum(cuts > MAX_CUT)):
        lines.append(
            f"{count} of {len(sizes)} pictures lose more than {share(MAX_CUT)} to the crop; the "
            f"most is {share(cuts.max())} ({worst(cuts)})"
        )
    return lines


def _name(data: Data, row: int) -> str:
    try:
        return data.rows[row].where
    except DataError:  # of an index, whose files may have gone since
        return f"row {row}"


def small_buckets(data: Data, batch_size: int) -> list[str]:
    """Buckets with fewer rows than each batch has rows of data."""
    return [f"{bucket} ({_rows(members)})" for bucket, members in data.assignment.items()
            if len(members) < batch_size]


def rare_buckets(data: Data) -> list[str]:
    """Buckets with far fewer rows than the largest, for each of which a train step is compiled."""
    most = max(map(len, data.assignment.values()))
    return [f"{bucket} ({_rows(members)})" for bucket, members in data.assignment.items()
            if len(members) * UNEQUAL < most]


def _rows(members: Sized) -> str:
    return f"{len(members)} row{'' if len(members) == 1 else 's'}"
