"""A run's data: validated rows, the bucket of each, and which rows every step takes."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

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
from dopsd_jax.data.rows import Needs, Row, read_rows


@dataclass
class Data:
    """Validated rows, the bucket of each, and which rows every step takes."""

    rows: list[Row]
    bucket_of: dict[int, Bucket]
    plan: BatchPlan

    @functools.cached_property
    def _digests(self) -> dict[Path, str]:
        files = dict.fromkeys(file for r in self.rows for file in r.images)
        return {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    def image_digest(self, row: int, image: int = -1) -> str:
        """SHA-256 of an image file of a row, by default of the target, by content alone."""
        return self._digests[self.rows[row].images[image]]

    def fingerprint(self) -> str:
        """Identifies names, captions and image files by content, wherever they lie."""
        rows = []
        for r in self.rows:
            *references, target = [self._digests[file] for file in r.images] or [r.size]
            beside = [references] if references else []
            enhanced = [] if r.enhanced is None else [r.enhanced]
            name = r.target.name if r.target else None
            rows.append((name, r.captions, r.where, target, *beside, *enhanced))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def pixels(self, row: int, image: int = -1) -> np.ndarray:
        """An image of a row, by default the target, float32 [H, W, 3] in [-1, 1].

        All images of a row have its bucket's size.

        Source: D-OPSD, flux2-klein-edit: references are cut to the target's bucket. The sampler
            of the published pipeline leaves them as large as they are.
        """
        bucket = self.bucket_of[row]
        file = self.rows[row].images[image]
        return fit_image(read_image(file), bucket.width, bucket.height)


def read_data(config: ConfigDict, needs: Needs) -> Data:
    """Reads, checks and plans all data of a run.

    Args:
        config: Of the run.
        needs: What the recipe reads of every row.

    Raises:
        DataError: Bad rows, or buckets that cannot fill a batch.
    """
    rows = read_rows(config.data, root=config.data_root or None, needs=needs)
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
