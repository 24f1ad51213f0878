"""Aspect buckets: the few image shapes a run compiles for, and which row goes where."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dopsd_jax.data.files import DataError


@dataclass(frozen=True, order=True)
class Bucket:
    """Rows of one shape.

    Attributes:
        width, height: Of the target in pixels, and of the references beside it.
        references: How many images a row has beside the target.
    """

    width: int
    height: int
    references: int = 0

    def __str__(self) -> str:
        beside = f" with {self.references} reference(s)" if self.references else ""
        return f"{self.width}x{self.height}{beside}"


# Source: D-OPSD, the bucket list of the training scripts. The order decides ties.
PUBLISHED = (
    Bucket(1024, 1024),
    Bucket(1152, 896),
    Bucket(896, 1152),
    Bucket(1152, 864),
    Bucket(864, 1152),
    Bucket(1248, 832),
    Bucket(832, 1248),
    Bucket(1280, 720),
    Bucket(720, 1280),
    Bucket(1344, 576),
    Bucket(576, 1344),
)


def make_buckets(resolution: int, multiple: int = 16) -> tuple[Bucket, ...]:
    """The published buckets, scaled so that the square one is resolution x resolution.

    Args:
        resolution: Side of the square bucket in pixels; 1024 gives `PUBLISHED`.
        multiple: What sides are rounded to: the VAE's stride times the denoiser's patch.

    Returns:
        Buckets in the published order, those that round to an earlier one left out.
    """
    if multiple < 1 or resolution < multiple:
        raise ValueError(
            f"expected resolution >= multiple >= 1, got resolution {resolution} and multiple "
            f"{multiple}"
        )

    def scale(side: int) -> int:
        return math.floor(side * resolution / 1024 / multiple + 0.5) * multiple

    return tuple(dict.fromkeys(Bucket(scale(b.width), scale(b.height)) for b in PUBLISHED))


def parse_buckets(text: str, multiple: int = 16) -> tuple[Bucket, ...]:
    """Buckets from text, width first: "512x512,768x512".

    Raises:
        ValueError: Every entry that is not a bucket, is not a multiple, or could never be chosen.
    """
    buckets, problems = [], []
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", entry)
        if not match:
            problems.append(f"{entry.strip()!r}: expected WIDTHxHEIGHT")
            continue
        bucket = Bucket(int(match[1]), int(match[2]))
        same = [b for b in buckets if b.width * bucket.height == b.height * bucket.width]
        if any(side < 1 or side % multiple for side in (bucket.width, bucket.height)):
            problems.append(f"{bucket}: expected sides that are multiples of {multiple}")
        elif same:
            problems.append(
                f"{bucket}: has the shape of {same[0]}, which comes first and takes all its rows"
            )
        else:
            buckets.append(bucket)
    if problems:
        raise ValueError(
            f'buckets: expected a list like "512x512,768x512", got {text!r}: ' + "; ".join(problems)
        )
    return tuple(buckets)


def nearest_bucket(size: tuple[int, int], buckets: Sequence[Bucket]) -> Bucket:
    """The bucket nearest in log aspect ratio to (width, height); the first one wins a tie."""
    log_aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda b: abs(log_aspect - math.log(b.width / b.height)))


def assign_buckets(
    shapes: Iterable[tuple[tuple[int, int], int]], buckets: Sequence[Bucket]
) -> dict[Bucket, Sequence[int]]:
    """Indices of rows by bucket, in bucket order, without the empty buckets.

    Args:
        shapes: Of every row the target's (width, height), which chooses among `buckets`, and the
            number of its references, which splits what that chose.
        buckets: In the order that decides ties.
    """
    assignment: dict[Bucket, array] = {}
    nearest: dict[tuple[tuple[int, int], int], Bucket] = {}
    for index, shape in enumerate(shapes):
        if shape not in nearest:
            size, references = shape
            nearest[shape] = replace(nearest_bucket(size, buckets), references=references)
        assignment.setdefault(nearest[shape], array("q")).append(index)
    order = {(bucket.width, bucket.height): i for i, bucket in enumerate(buckets)}
    return dict(sorted(
        assignment.items(), key=lambda item: (order[item[0].width, item[0].height],
                                              item[0].references)
    ))


def repeated(
    assignment: Mapping[Bucket, Sequence[int]], repeats: Mapping[int, int]
) -> dict[Bucket, Sequence[int]]:
    """The same with rows as often as they count; all rows once come first.

    Args:
        assignment: Rows by bucket.
        repeats: Of the rows that count more than once how often.
    """
    if not repeats:
        return dict(assignment)
    found = {}
    for bucket, rows in assignment.items():
        most = max(repeats.get(row, 1) for row in rows)
        found[bucket] = array("q", (
            row for turn in range(most) for row in rows if repeats.get(row, 1) > turn
        ))
    return found


def check_fillable(
    assignment: Mapping[Bucket, Sequence[int]], batch_size: int, policy: str
) -> None:
    """Refuses buckets with fewer rows than a batch, unless rows may repeat within a batch.

    Differs from reference: it drops such a bucket, and the end of every other, in silence.

    Args:
        assignment: Rows by bucket, from `assign_buckets`.
        batch_size: Rows per global batch.
        policy: "error", or "repeat" to let a small bucket's rows come more than once in a batch.

    Raises:
        DataError: All small buckets with their counts, and what can be done.
    """
    if policy not in ("error", "repeat"):
        raise ValueError(f'small_buckets: expected "error" or "repeat", got {policy!r}')
    small = {bucket: len(rows) for bucket, rows in assignment.items() if len(rows) < batch_size}
    if small and policy == "error":
        raise DataError(
            f"expected at least batch_size = {batch_size} rows in every bucket, got "
            + ", ".join(f"{count} in {bucket}" for bucket, count in small.items())
            + f"; choose batch_size <= {min(small.values())}, another list of buckets, or "
            'small_buckets="repeat" to repeat rows within a batch'
        )
