"""A run's data before the run: every row as it will be cropped and read, and what may be wrong.

`warn` says in a run's log what sizes alone say; `inspect` opens the pictures too, for the command
`python -m dopsd_jax.data`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.core.log import log
from dopsd_jax.data import crops, looks
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.datasets import Data, read_data
from dopsd_jax.data.drafts import Draft
from dopsd_jax.data.files import DataError, with_progress
from dopsd_jax.data.keeping import kept_rows
from dopsd_jax.data.looks import Look
from dopsd_jax.data.rows import Row
from dopsd_jax.run.caption_check import Captions
from dopsd_jax.run.config import check_config, needs_of_rows

TRANSPARENT = 0.01  # share of a picture; the rim of a drawing with smooth edges is less


@dataclass
class RowLook:
    """A row as a run uses it.

    Attributes:
        number: Of the row in the data, from 0.
        row: What it says.
        bucket: Its bucket.
        looks: Its images, the references first, the target last.
        tokens: Caption key -> role -> how many tokens it reads; None for what it cannot read.
        problems: What a run would refuse it for.
        warnings: What else may be wrong with it.
    """

    number: int
    row: Row
    bucket: Bucket
    looks: list[Look] = field(default_factory=list)
    tokens: dict[str, dict[str, int | None]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def target(self) -> Look | None:
        return self.looks[-1] if self.looks and self.row.target else None

    def image_name(self, image: int) -> str:
        """What an image of the row is called beside the others."""
        return "" if image == len(self.row.images) - 1 else f"reference {image + 1}"


@dataclass(frozen=True)
class Note:
    """What is said of a row.

    Attributes:
        weight: How bad it is, beside others of its kind.
        row: Of which.
        words: What.
        look: Its image that it is about; None where none is.
    """

    weight: float
    row: RowLook
    words: str
    look: Look | None


@dataclass(frozen=True)
class Warned:
    """One kind of warning.

    Attributes:
        title: What is the matter.
        advice: What follows from it, and what can be done.
        rows: Whom it concerns, the worst first; empty where it concerns the whole set.
    """

    title: str
    advice: str
    rows: tuple[Note, ...] = ()


@dataclass
class Inspection:
    """What `inspect` found.

    Attributes:
        data: Of the run; None where no row can be used.
        refused: Rows that a run refuses before anything else, and why.
        rows: Those that were looked at, all or evenly spread.
        warned: The worst kind first.
        of_all: What sizes say of all rows, where not all were looked at.
        limits: Role -> how many tokens it takes.
    """

    data: Data | None
    refused: list[Draft]
    rows: list[RowLook] = field(default_factory=list)
    warned: list[Warned] = field(default_factory=list)
    of_all: list[str] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)

    def refusals(self) -> list[tuple[str, str]]:
        """Where a run would stop, and why."""
        return [(d.where, p) for d in self.refused for p in d.problems] + [
            (r.row.where, p) for r in self.rows for p in r.problems
        ]


def rows_of_batch(config: ConfigDict) -> int:
    """How many rows of data each batch has."""
    return max(config.batch_size - kept_rows(config.batch_size, config.keep_share), 1)


def warn(config: ConfigDict, data: Data) -> None:
    """Says in the log what sizes and buckets say against a run's data, a line for each kind."""
    lines = crops.worst_shapes(data)
    if small := crops.small_buckets(data, count := rows_of_batch(config)):
        lines.append(f"rows come several times in one batch, which takes {count}, from the "
                     f"buckets {', '.join(small)}")
    if rare := crops.rare_buckets(data):
        lines.append(f"buckets of few rows beside the largest: {', '.join(rare)}")
    for line in lines:
        log.warning("warning: %s", line)
    if lines:
        log.warning("look at every row as it is cropped: python -m dopsd_jax.data with the same "
                    "--config flags")


def inspect(config: ConfigDict, limit: int = 0) -> Inspection:
    """Reads a run's data as the run would, and looks at its rows.

    Args:
        config: Of the run.
        limit: At most so many rows are looked at, evenly spread; 0: all.

    Raises:
        ValueError: A config that no data can be read with, or no data.
    """
    check_config(config, starts=False)
    captions, refused = Captions(config), []
    try:
        data = read_data(config, needs_of_rows(config), refused)
    except DataError:
        if not refused:
            raise
        return Inspection(None, refused, limits=captions.limits)
    numbers = range(len(data.rows))
    if 0 < limit < len(numbers):
        numbers = np.unique(np.linspace(0, len(numbers) - 1, limit).round().astype(int)).tolist()
    found = Inspection(data, refused, limits=captions.limits)
    for number in with_progress(numbers, len(numbers), "read %d of %d rows"):
        try:
            row = data.rows[number]
        except DataError as error:  # an index reads it only now
            refused.append(Draft(f"row {number + 1}", problems=[str(error)]))
            continue
        found.rows.append(_read(RowLook(number, row, data.bucket(number)), captions))
    with ThreadPool(min(16, os.cpu_count() or 1)) as pool:
        looked = with_progress(pool.imap(_look, found.rows), len(found.rows),
                               "looked at %d of %d rows")
        for _ in looked:
            pass
    if len(found.rows) < len(data.rows):
        found.of_all = crops.worst_shapes(data)
    found.warned = [*_warn_of_rows(config, found), *_warn_of_set(config, data, found.rows)]
    return found


def _read(row: RowLook, captions: Captions) -> RowLook:
    """Adds what the tokenizers say."""
    for key, caption in row.row.captions.items():
        row.tokens[key] = {role: captions.tokens(role, row.row, caption, row.bucket)
                           for role in captions.limits}
    row.problems += [p.removeprefix(row.row.where).lstrip(":, ")
                     for p in captions.problems(row.row, row.bucket)]
    return row


def _look(row: RowLook) -> None:
    """Adds what the pictures show."""
    for image in row.row.images:
        try:
            row.looks.append(looks.look_at(image, row.bucket))
        except DataError as error:
            row.problems.append(str(error))
            row.looks = []
            return


def _noted(title: str, advice: str, notes: Iterable[Note]) -> list[Warned]:
    """A kind of warning with the rows it concerns, none where there are none."""
    worst: dict[int, Note] = {}
    for note in sorted(notes, key=lambda note: -note.weight):
        note.row.warnings.append(note.words)
        worst.setdefault(note.row.number, note)
    return [Warned(title, advice, tuple(worst.values()))] if worst else []


def _images(rows: list[RowLook]) -> list[tuple[RowLook, str, Look]]:
    """Every image of every row, with "reference 1: " or nothing before what is said of it."""
    return [
        (row, f"{name}: " if (name := row.image_name(i)) else "", look)
        for row in rows for i, look in enumerate(row.looks)
    ]


def _warn_of_rows(config: ConfigDict, found: Inspection) -> list[Warned]:
    """What concerns single rows, the worst kind first."""
    images = _images(found.rows)
    warned = _noted(
        "One colour and nothing else",
        "A run learns to draw an empty picture for such a caption: take the row out.",
        [Note(1, row, f"{name}nothing but one colour", look)
         for row, name, look in images if look.blank],
    )
    warned += _noted(
        f"Enlarged more than {crops.MAX_ENLARGED:g} times",
        "Such pictures are soft, and soft pictures are what the model learns from them: find "
        "larger files, or choose a smaller resolution.",
        [Note(look.enlarged, row, f"{name}enlarged {crops.times(look.enlarged)}, from "
              f"{look.size[0]}x{look.size[1]}", look)
         for row, name, look in images if look.enlarged > crops.MAX_ENLARGED],
    )
    warned += _noted(
        f"More than {crops.share(crops.MAX_CUT)} cut away",
        "Captions may tell of what is no longer there: crop the pictures yourself, or give them a "
        "bucket of their shape (--config.buckets).",
        [Note(look.cut, row, f"{name}{crops.share(look.cut)} of the picture is cut away", look)
         for row, name, look in images if look.cut > crops.MAX_CUT],
    )
    warned += _noted(
        "Captions without a word", "They say nothing: write what is to be seen.",
        [Note(1, row, f"{key}: {text.strip()!r:.40} has neither letter nor digit", row.target)
         for row in found.rows for key, text in row.row.captions.items()
         if not any(c.isalnum() for c in text)],
    )
    warned += _noted(
        "Captions whose end is not read",
        "They are longer than the limits, and truncate_prompts cuts them, the end of the chat "
        "template included: shorten them, or raise the limits.",
        [Note(count - limit, row, f"{key}: {count} tokens, the {role} reads {limit}", row.target)
         for row in found.rows for key, counts in row.tokens.items()
         for role, count in counts.items()
         if config.truncate_prompts and count and count > (limit := found.limits[role])],
    )
    warned += _noted(
        "Transparent parts become white",
        "Training sees no transparency: put such pictures on the ground they should have.",
        [Note(look.transparent, row, f"{name}{crops.share(look.transparent)} of the picture is "
              "transparent and becomes white", look)
         for row, name, look in images if look.transparent > TRANSPARENT],
    )
    return warned + _warn_of_twins(found.rows) + _warn_of_blur(found.rows)


def _warn_of_twins(rows: list[RowLook]) -> list[Warned]:
    seen = [row for row in rows if row.target and not row.target.blank]
    found = []
    for group in looks.twins([row.target for row in seen]):
        for i in group:
            others = [f"#{seen[j].number + 1}" for j in group if j != i]
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            words = f"nearly the same picture as {', '.join(others[:5])}{more}"
            found.append(Note(len(group), seen[i], words, seen[i].target))
    return _noted("Nearly the same picture",
                  "Together they count as often as they are many, and are learned by heart first: "
                  "keep one of each, unless that is meant.", found)


def _warn_of_blur(rows: list[RowLook]) -> list[Warned]:
    # Of one that is much enlarged it is said already.
    seen = [row for row in rows if row.target and row.target.enlarged <= crops.MAX_ENLARGED]
    found = looks.blurred([row.target.sharpness for row in seen])
    return _noted(
        "Less sharp than the others",
        "Their sharpest edges are several pixels wide at the size of training: look whether they "
        "are out of focus or shaken.",
        [Note(-seen[i].target.sharpness, seen[i], "blurred beside the others", seen[i].target)
         for i in found],
    )


def _warn_of_set(config: ConfigDict, data: Data, rows: list[RowLook]) -> list[Warned]:
    """What concerns the set as a whole."""
    warned, batch = [], rows_of_batch(config)
    texts = {text.strip() for row in rows for text in row.row.captions.values()}
    if len(rows) > 1 and len(texts) == 1:
        warned.append(Warned(
            "All rows have the same caption",
            "Whatever the pictures have in common, and all else in them, is tied to these words; "
            "say of each what is not to be learned, unless that is meant.",
        ))
    if config.small_buckets == "repeat" and (small := crops.small_buckets(data, batch)):
        warned.append(Warned(
            f"Fewer rows than a batch of {batch} takes: {', '.join(small)}",
            "Such rows come several times in one batch (small_buckets = repeat): crop them to the "
            "shape of others, or choose fewer buckets.",
        ))
    if rare := crops.rare_buckets(data):
        warned.append(Warned(
            f"Few rows beside the largest bucket: {', '.join(rare)}",
            "A train step is compiled for each bucket, which takes minutes: crop such pictures to "
            "the shape of others, or leave them out.",
        ))
    return warned
