"""A run's data: validated rows, the bucket of each, and which rows every step takes."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.core import mirror
from dopsd_jax.core.files import split_paths
from dopsd_jax.core.log import log
from dopsd_jax.data.batches import BatchPlan, BatchRows
from dopsd_jax.data.buckets import (
    Bucket,
    assign_buckets,
    check_fillable,
    make_buckets,
    parse_buckets,
    repeated,
)
from dopsd_jax.data.drafts import Draft, Needs
from dopsd_jax.data.files import DataError, ImageSource
from dopsd_jax.data.images import fit_image, read_image
from dopsd_jax.data.indexed import IndexedRows
from dopsd_jax.data.keeping import PlanWithKept, kept_rows, read_kept
from dopsd_jax.data.rows import Row, check_rows, read_rows

DIGESTS_KEPT = 4096  # of an index
SAMPLED = 16  # rows of an index whose images are identified


class Joined(Sequence):
    """Rows of several data sets, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Row]]):
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Row:
        part = bisect.bisect_right(self._ends, row)
        return self._parts[part][row - (self._ends[part - 1] if part else 0)]

    def sizes(self) -> np.ndarray:
        return np.concatenate([part.sizes() for part in self._parts])


@dataclass(frozen=True)
class DataSet:
    """One of a run's data sets.

    Attributes:
        path: As the config names it.
        rows: How many usable rows it has.
        weight: See data_weights; None where each row is seen equally often.
    """

    path: str
    rows: int
    weight: float | None = None


@dataclass
class Data:
    """Rows, the bucket of each, and which rows every step takes.

    Attributes:
        rows: All rows; of an index each is read when it is asked for.
        assignment: Rows by bucket.
        plan: Which rows every step takes.
        index: What identifies rows that are not read ahead, or "".
        keep_prompts: On which the student is to stay as it was, by file, see data/keeping.py; may
            be empty.
        earlier: The data of every earlier task, of which previews show some rows.
        sets: The data sets that the rows come from, one after the other.
    """

    rows: Sequence[Row]
    assignment: Mapping[Bucket, Sequence[int]]
    plan: BatchPlan | PlanWithKept
    index: str = ""
    keep_prompts: tuple[tuple[str, ...], ...] = ()
    earlier: tuple[Data, ...] = ()
    sets: tuple[DataSet, ...] = ()
    _digests: dict[ImageSource, str] = field(default_factory=dict)

    def __post_init__(self):
        self._buckets = tuple(self.assignment)
        self._bucket_of = np.empty(len(self.rows), np.int16)
        for number, members in enumerate(self.assignment.values()):
            self._bucket_of[np.asarray(members, np.int64)] = number

    def first_rows(self, count: int, *, repeat: bool = False) -> BatchRows:
        """The first rows of the largest bucket, so that all pictures have one shape.

        Args:
            count: At most so many.
            repeat: Take rows again where there are fewer.
        """
        first = max(self.assignment, key=lambda bucket: len(self.assignment[bucket]))
        rows = self.assignment[first]
        rows = list(itertools.islice(itertools.cycle(rows) if repeat else rows, count))
        return BatchRows(
            first, tuple(rows), tuple(next(iter(self.rows[i].captions)) for i in rows)
        )

    def largest_bucket(self) -> Bucket:
        """The bucket with rows whose pictures are largest, references counted."""
        return max(
            (bucket for bucket, rows in self.assignment.items() if len(rows)),
            key=lambda b: b.width * b.height * (1 + b.references),
        )

    def captions(self, rows: BatchRows) -> list[str]:
        """The captions that rows use."""
        return [
            self.rows[i].captions[key]
            for i, key in zip(rows.rows, rows.caption_keys, strict=True)
        ]

    def bucket(self, row: int) -> Bucket:
        """The bucket of a row."""
        return self._buckets[self._bucket_of[row]]

    def sizes(self) -> np.ndarray:
        """int32 [rows, 2]: width and height of every target in pixels, zeros where none is known.

        No row is read for it: those of an index are known as far as the index needs them.
        """
        if isinstance(self.rows, Joined):
            return self.rows.sizes()
        return np.array([row.size if row.target else (0, 0) for row in self.rows], np.int32)

    def image_digest(self, row: int, image: int = -1) -> str:
        """SHA-256 of an image file of a row, by default of the target, by content alone."""
        return self._digest(self.rows[row].images[image])

    def _digest(self, file: ImageSource) -> str:
        if file not in self._digests:
            if self.index and len(self._digests) >= DIGESTS_KEPT:
                self._digests.clear()
            self._digests[file] = hashlib.sha256(file.read_bytes()).hexdigest()
        return self._digests[file]

    def fingerprint(self) -> str:
        """Identifies names, captions and image files by content, wherever they lie.

        Of an index: what its files say of the rows, without opening images; see `sampled_images`.
        """
        if self.index:
            return hashlib.sha256(self.index.encode()).hexdigest()[:16]
        rows = []
        for r in self.rows:
            *references, target = [self._digest(file) for file in r.images] or [r.size]
            beside = [references] if references else []
            enhanced = [] if r.enhanced is None else [r.enhanced]
            name = r.target.name if r.target else None
            rows.append((name, r.captions, r.where, target, *beside, *enhanced))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def sampled_images(self) -> str:
        """Identifies the image files of SAMPLED rows, spread evenly: a word for each row.

        Of an index, whose images are not opened ahead, they stand for all.
        """
        words = []
        for row in np.linspace(0, len(self.rows) - 1, min(SAMPLED, len(self.rows))).astype(int):
            try:
                images = [self._digest(file) for file in self.rows[int(row)].images]
            except DataError:
                images = []  # a run says so when it comes to the row
            words.append(hashlib.sha256(json.dumps(images).encode()).hexdigest()[:8])
        return " ".join(words)

    def pixels(self, row: int, image: int = -1) -> np.ndarray:
        """An image of a row, by default the target, float32 [H, W, 3] in [-1, 1].

        All images of a row have its bucket's size.

        Source: D-OPSD, flux2-klein-edit: references are cut to the target's bucket. The sampler
            of the published pipeline leaves them as large as they are.
        """
        bucket = self.bucket(row)
        file = self.rows[row].images[image]
        return fit_image(read_image(file), bucket.width, bucket.height)


def parse_data(data: str, weights: str) -> tuple[list[str], list[float] | None]:
    """The data sets of a run, "a.jsonl,b.parquet", and their weights, "3,1".

    Raises:
        ValueError: Nothing between commas, weights that are none, or not as many as data sets.
    """
    try:
        sets = split_paths(data)
    except ValueError as e:
        raise ValueError(f"data: {e}") from None
    if not weights:
        return sets, None
    try:
        found = [float(text) for text in weights.split(",")]
    except ValueError:
        found = []
    if len(found) != len(sets) or not all(0 < w < math.inf for w in found):
        raise ValueError(
            f"data_weights: expected {len(sets)} numbers above 0, one for each data set of "
            f"{data!r}, got {weights!r}"
        )
    return sets, found


def read_data(
    config: ConfigDict, needs: Needs, refused: list[Draft] | None = None, *, learned: bool = True
) -> Data:
    """Reads, checks and plans all data of a run; with encode=online, makes an index alone.

    Args:
        config: Of the run.
        needs: What the recipe reads of every row.
        refused: Takes what a run would be refused for, rows and small buckets; the data is then
            that of all other rows.
        learned: It is learned from, and not only previewed: the log tells its buckets.

    Raises:
        DataError: Bad rows, or buckets that cannot fill a batch, unless `refused` takes them; no
            data there, or no usable row in it.
    """
    sets, weights = parse_data(config.data, config.data_weights)
    if remote := [part for part in sets if mirror.is_remote(part)]:
        raise DataError(
            f"data: expected files of this machine, got {remote[0]}; copy them here first, or "
            "mount the bucket"
        )
    buckets = parse_buckets(config.buckets) if config.buckets else make_buckets(config.resolution)
    rows, found, shapes, repeats, index = _read_sets(
        config, needs, sets, weights, one_shape=len(buckets) == 1, refused=refused
    )
    if not len(rows):
        raise DataError(f"{config.data}: zero usable rows")
    assignment = repeated(assign_buckets(shapes, buckets), repeats)
    if repeats:
        log.info("%d rows count several times, by the numbers before _ in their folders' names; "
                 "an epoch has %d", len(repeats), sum(map(len, assignment.values())))
    kept = kept_rows(config.batch_size, config.keep_share)
    batch_size = max(config.batch_size - kept, 1)  # of rows of data
    try:
        check_fillable(assignment, batch_size, config.small_buckets)
    except DataError as error:
        if refused is None:
            raise
        refused.append(Draft("buckets", problems=[str(error)]))
    if learned:
        log.info(
            "%d rows in %d buckets: %s; that many shapes of the train step will be compiled",
            len(rows), len(assignment), ", ".join(f"{b} x{len(r)}" for b, r in assignment.items()),
        )
    plan = BatchPlan(
        assignment, lambda row: list(rows[row].captions), batch_size=batch_size,
        seed=config.seed, sizes=[s.rows for s in found if s.rows],
        weights=weights and [s.weight for s in found if s.rows],
    )
    prompts: tuple[tuple[str, ...], ...] = ()
    if kept:
        prompts = read_kept(config.keep_prompts)
        plan = PlanWithKept(
            plan, prompts, batch_size=config.batch_size, count=kept, seed=config.seed
        )
    return Data(rows, assignment, plan, index, prompts, read_earlier(config, needs), found)


def _read_sets(
    config: ConfigDict, needs: Needs, sets: Sequence[str], weights: Sequence[float] | None, *,
    one_shape: bool, refused: list[Draft] | None,
) -> tuple[Sequence[Row], tuple[DataSet, ...], Iterable, dict[int, int], str]:
    """The rows of data sets, read or indexed.

    Returns:
        Rows; the data sets; what `assign_buckets` takes of each row; of the rows that count more
        than once how often; what identifies an index, or "".
    """
    root, index = config.data_root or None, ""
    if config.encode == "online":
        parts = [
            IndexedRows(path, root=root, needs=needs, one_shape=one_shape, refused=refused)
            for path in sets
        ]
        index = json.dumps([part.identity() for part in parts])
        shapes = itertools.chain.from_iterable(part.shapes() for part in parts)
        firsts = itertools.accumulate(map(len, parts), initial=0)
        repeats = {first + row: count for first, part in zip(firsts, parts, strict=False)
                   for row, count in part.repeats().items()}
        rows: Sequence[Row] = Joined(parts)
    else:
        parts = [_read_set(path, root, needs, refused) for path in sets]
        rows = list(itertools.chain.from_iterable(parts))
        shapes = ((row.size, len(row.references)) for row in rows)
        repeats = {i: row.repeats for i, row in enumerate(rows) if row.repeats > 1}
    found = zip(sets, map(len, parts), weights or [None] * len(sets), strict=True)
    return rows, tuple(itertools.starmap(DataSet, found)), shapes, repeats, index


def _read_set(
    path: str, root: str | None, needs: Needs, refused: list[Draft] | None
) -> list[Row]:
    """The rows of a data set; `refused` takes those that cannot be used, which else raise."""
    if refused is None:
        return read_rows(path, root=root, needs=needs)
    rows, bad = check_rows(path, root=root, needs=needs)
    refused += bad
    return rows


def read_earlier(config: ConfigDict, needs: Needs) -> tuple[Data, ...]:
    """The data of every earlier task of a run, as `read_data` reads a run's own."""
    changes = {"data_weights": "", "small_buckets": "repeat", "keep_share": 0.0,
               "earlier_data": ""}
    found = []
    for data in filter(None, config.earlier_data.split(";")):
        one = config.copy_and_resolve_references()
        one.update(changes | {"data": data})
        found.append(read_data(one, needs, learned=False))
    return tuple(found)
