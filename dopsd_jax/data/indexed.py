"""Rows of a data set too large to look at before a run: an index in memory, the rest on disk.

What rows say is checked when the index is made, as far as that reads no images; a row's images are
looked for, opened and checked when it is used.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dopsd_jax.core.log import log
from dopsd_jax.data.drafts import SQUARE, Draft, Needs, scan_folder
from dopsd_jax.data.files import DataError, read_size, with_progress
from dopsd_jax.data.records import Records, iterate
from dopsd_jax.data.rows import (
    MAX_LISTED,
    Row,
    check_number,
    draft_of,
    open_set,
    raise_problems,
    resolve_images,
    root_of,
    row_of,
)


class IndexedRows(Sequence):
    """The rows of one data set by number; each is read again whenever it is asked for.

    Where every picture goes to one bucket and only recipes of one image per row are used, nothing
    need be known of a row before it is used; otherwise the index holds its size and number of
    images: as the row says it (`w*h`, or `width` and `height`), else from its image file's head.
    """

    def __init__(
        self, data: str | Path, *, root: str | Path | None, needs: Needs, one_shape: bool,
        refused: list[Draft] | None = None,
    ):
        """Makes the index.

        Args:
            data, root, needs: As of `rows.read_rows`.
            one_shape: Whether all rows go to one bucket, so that their sizes do not matter.
            refused: Takes the rows that say what cannot be used, which the index then leaves out.

        Raises:
            DataError: No such data, no row in it, or, unless they are to be left out, rows that say
                what cannot be used, together.
        """
        self._data, self._needs = Path(data).expanduser(), needs
        self._records: Records | _Folder = open_set(self._data, needs) or _Folder(self._data)
        self._root = root_of(self._data, root)
        if not len(self._records):
            raise DataError(f"{data}: expected rows, found none; zero usable rows")
        self._sized = not (one_shape and needs.images == (1, 1) and not needs.subject)
        self._widths, self._heights, self._references = array("i"), array("i"), array("i")
        self._usable: Sequence[int] = range(len(self._records))
        began = time.monotonic()
        if self._sized or not self._records.reads_images:
            self._look_at_all(refused)
        log.info("%s: an index of %d rows, made in %.0f s", self._data, len(self),
                 time.monotonic() - began)

    def _look_at_all(self, refused: list[Draft] | None) -> None:
        total, bad, usable = len(self._records), 0, array("q")
        listed = [] if refused is None else refused
        rows = with_progress(iterate(self._records), total, "index: %d of %d rows")
        for number, (where, record) in enumerate(rows):
            draft = self._draft(where, record)
            size = draft.size
            if size is None and self._sized and draft.paths and not draft.problems:
                size = self._measured(draft)
            else:
                check_number(draft, self._needs)
            if draft.problems:
                bad += 1
                if refused is not None or bad <= MAX_LISTED:
                    listed.append(Draft(draft.where, problems=draft.problems))
                continue
            usable.append(number)
            if self._sized:
                width, height = size or SQUARE
                self._widths.append(width)
                self._heights.append(height)
                images = len(draft.subject) + len(draft.paths)
                self._references.append(max(images - 1, 0))
        if refused is None:
            raise_problems(self._data, listed, bad, total)
        if bad:
            self._usable = usable

    def _measured(self, draft: Draft) -> tuple[int, int] | None:
        """The target's size by its file's head."""
        resolve_images(draft, self._root, self._needs)
        if draft.problems:
            return None
        try:
            return read_size(draft.images[-1])
        except DataError as error:
            draft.problems.append(str(error))
            return None

    def _draft(self, where: str, record: object) -> Draft:
        return record if isinstance(record, Draft) else draft_of(where, record, self._needs)

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, row: int) -> Row:
        """A row as it is now; its images exist, but were not opened.

        Raises:
            DataError: It cannot be used.
        """
        if not 0 <= row < len(self):
            raise IndexError(row)
        number = self._usable[row]
        where = self._records.where(number)
        try:
            record = self._records[number]
        except DataError as error:
            record = error
        draft = self._draft(where, record)
        if not draft.problems:
            resolve_images(draft, self._root, self._needs)
        if draft.problems:
            raise DataError(f"{self._data}: {where}: {'; also '.join(draft.problems)}")
        size = draft.size
        if self._sized:
            size = self._widths[row], self._heights[row]
        return row_of(draft, size)

    def shapes(self) -> Iterator[tuple[tuple[int, int], int]]:
        """Of every row the size and the number of references, as `assign_buckets` takes them."""
        if not self._sized:
            return ((SQUARE, 0) for _ in range(len(self)))
        return (
            ((w, h), n) for w, h, n in
            zip(self._widths, self._heights, self._references, strict=True)
        )

    def sizes(self) -> np.ndarray:
        """int32 [rows, 2]: width and height of every target, zeros where none is known."""
        # A row that needs no picture may say how large one would be.
        if not self._sized or self._needs.images[0] == 0:
            return np.zeros((len(self), 2), np.int32)
        return np.stack([np.asarray(self._widths), np.asarray(self._heights)], axis=1)

    def repeats(self) -> dict[int, int]:
        """Of the rows that count more than once how often."""
        if not isinstance(self._records, _Folder):
            return {}
        counts = ((row, self._records[n].repeats) for row, n in enumerate(self._usable))
        return {row: count for row, count in counts if count > 1}

    def identity(self) -> str:
        """Changes with what the rows say; images are not read for it."""
        return self._records.identity()


class _Folder:
    """A folder of images and captions as records that are drafts already."""

    reads_images = False

    def __init__(self, folder: Path):
        self._drafts = scan_folder(folder)

    def __len__(self) -> int:
        return len(self._drafts)

    def where(self, row: int) -> str:
        return self._drafts[row].where

    def __getitem__(self, row: int) -> Draft:
        draft = self._drafts[row]
        return Draft(draft.where, list(draft.paths), captions=draft.captions,
                     problems=list(draft.problems), repeats=draft.repeats)

    def identity(self) -> str:
        return repr([(d.where, d.captions) for d in self._drafts])
