"""A run's data: validated rows, the bucket of each, and which rows every step takes."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.core.log import log
from dopsd_jax.data.batches import BatchPlan
from dopsd_jax.data.buckets import (
    Bucket,
    assign_buckets,
    check_fillable,
    make_buckets,
    parse_buckets,
)
from dopsd_jax.data.images import fit_image, read_image
from dopsd_jax.data.rows import Row, read_rows


@dataclass
class Data:
    """Validated rows, the bucket of each, and which rows every step takes."""

    rows: list[Row]
    bucket_of: dict[int, Bucket]
    plan: BatchPlan

    @functools.cached_property
    def image_digests(self) -> list[str]:
        """Of every row: the target file's SHA-256, by content alone."""
        files = dict.fromkeys(r.target for r in self.rows)
        digests = {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        return [digests[r.target] for r in self.rows]

    def fingerprint(self) -> str:
        """Identifies names, captions and image files by content, wherever they lie."""
        rows = [
            (r.target.name, r.captions, r.where, digest)
            for r, digest in zip(self.rows, self.image_digests, strict=True)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def pixels(self, row: int) -> np.ndarray:
        """The target image of a row, float32 [H, W, 3] in [-1, 1], at its bucket's size."""
        bucket = self.bucket_of[row]
        return fit_image(read_image(self.rows[row].target), bucket.width, bucket.height)


def read_data(config: ConfigDict) -> Data:
    """Reads, checks and plans all data of a run.

    Raises:
        DataError: Bad rows, or buckets that cannot fill a batch.
    """
    rows = read_rows(config.data, root=config.data_root or None)
    buckets = parse_buckets(config.buckets) if config.buckets else make_buckets(config.resolution)
    assignment = assign_buckets(rows, buckets)
    check_fillable(assignment, config.batch_size, config.small_buckets)
    log.info(
        "%d rows in %d buckets: %s; that many shapes of the train step will be compiled",
        len(rows), len(assignment), ", ".join(f"{b} x{len(r)}" for b, r in assignment.items()),
    )
    plan = BatchPlan(
        assignment, [list(r.captions) for r in rows], batch_size=config.batch_size,
        seed=config.seed,
    )
    bucket_of = {i: b for b, members in assignment.items() for i in members}
    return Data(rows, bucket_of, plan)
