"""Image-text rows: a data set of any kind -> rows that are known to be usable.

Every row is checked and every image fully decoded before training starts, and all bad rows are
reported together. See indexed.py for data sets that are too large for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dopsd_jax.data.drafts import (
    ENHANCED_KEY,
    SQUARE,
    SUBJECT_KEY,
    Draft,
    Needs,
    read_record,
    scan_folder,
    shorten,
)
from dopsd_jax.data.files import (
    IMAGE_EXTENSIONS,
    DataError,
    ImageSource,
    StoredImage,
    measure_all,
)
from dopsd_jax.data.records import Records, iterate, open_records

MAX_LISTED = 20


@dataclass(frozen=True)
class Row:
    """One image-text pair, and what a recipe shows beside it.

    Attributes:
        where: "train.jsonl:3" or "cat.jpg", for messages.
        images: Existing files, or images inside one: references, or other pictures of the subject;
            the last one is the target. Empty where a recipe needs none.
        captions: Caption by key, never empty, in the order of `CAPTION_KEYS`.
        size: (width, height) of the target in pixels, upright; without one as the row says it, or
            SQUARE.
        class_name: What `[V]` stands for, or None.
        enhanced: The teacher's text, of recipes that read one.
        repeats: How often it counts.
    """

    where: str
    images: tuple[ImageSource, ...]
    captions: dict[str, str]
    size: tuple[int, int]
    class_name: str | None
    enhanced: str | None = None
    repeats: int = 1

    @property
    def target(self) -> ImageSource | None:
        return self.images[-1] if self.images else None

    @property
    def references(self) -> tuple[ImageSource, ...]:
        return self.images[:-1]


def read_rows(
    data: str | Path, *, root: str | Path | None = None, needs: Needs = Needs()
) -> list[Row]:
    """Reads and checks every row of a data set, and refuses it where one cannot be used.

    Args:
        data: A JSONL file of the published format, or the same as a JSON array or CSV; a folder of
            images with a .txt or .caption beside each, or a metadata.jsonl or metadata.csv for all;
            Parquet files, as Hugging Face datasets writes them; WebDataset .tar files; a TFDS data
            set in ArrayRecord files.
        root: Folder that relative paths start from and that no image may lie outside of. By
            default the folder itself, or the folder of the file.
        needs: What the recipe reads of every row; what else a row holds is ignored.

    Returns:
        Rows in file order, or sorted by name (folder of images).

    Raises:
        DataError: All bad rows together, each with where, what was expected and what came.

    Source: D-OPSD, z-image-turbo_self-distill-vlm/dataset.py and local_paths.py.
        Differs from reference: a row that cannot be used is an error before training starts, not
        replaced by another row while it runs; a row with more images than the recipe uses is an
        error, not cut to the first.
    """
    rows, refused = check_rows(data, root=root, needs=needs)
    raise_problems(Path(data).expanduser(), refused[:MAX_LISTED], len(refused),
                   len(rows) + len(refused))
    return rows


def check_rows(
    data: str | Path, *, root: str | Path | None = None, needs: Needs = Needs()
) -> tuple[list[Row], list[Draft]]:
    """As `read_rows`: the usable rows, and those that are refused, each with its problems.

    Raises:
        DataError: No such data, or no rows in it.
    """
    data = Path(data).expanduser()
    records = open_set(data, needs)
    if records is None:
        drafts = scan_folder(data)
        expected = f"an image ({', '.join(IMAGE_EXTENSIONS)})"
    else:
        drafts = [draft_of(where, record, needs) for where, record in iterate(records)]
        is_lines = data.is_file() and data.suffix in ("", ".jsonl", ".json")
        expected = "a JSON object per line" if is_lines else "rows"
    if not drafts:
        raise DataError(f"{data}: expected {expected}, found none; zero usable rows")

    root = root_of(data, root)
    for draft in drafts:
        resolve_images(draft, root, needs)
    # Rows may share an image; each file is decoded once.
    sizes = measure_all(dict.fromkeys(path for draft in drafts for path in draft.images))
    for draft in drafts:
        broken = (sizes[path] for path in dict.fromkeys(draft.images))
        draft.problems += [str(error) for error in broken if isinstance(error, DataError)]
    usable = [d for d in drafts if not d.problems]
    rows = [row_of(d, sizes[d.images[-1]] if d.images else d.size) for d in usable]
    return rows, [d for d in drafts if d.problems]


def open_set(data: Path, needs: Needs) -> Records | None:
    """The records of a data set; None for a folder of images, which not every recipe can use."""
    records = open_records(data)
    if records is None and not needs.one_pair:
        raise DataError(
            f"{data}: expected a JSONL file, because this recipe reads {_words(needs)} of every "
            "row, got a folder, whose rows are one image and one caption"
        )
    return records


def root_of(data: Path, root: str | Path | None) -> Path:
    """The folder that no image may lie outside of."""
    root = Path(root if root is not None else data if data.is_dir() else data.parent)
    root = root.expanduser().resolve()
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise DataError(f"data_root: expected a folder, got {str(root)!r}, which {found}")
    return root


def draft_of(where: str, record: object, needs: Needs) -> Draft:
    """A record as `iterate` gives it, as a draft; of an unreadable one the reason alone."""
    if isinstance(record, DataError):
        return Draft(where, problems=[str(record)])
    return read_record(where, record, needs)


def row_of(draft: Draft, size: tuple[int, int] | None) -> Row:
    """A draft without problems as a row."""
    return Row(draft.where, tuple(draft.images), draft.captions, size or SQUARE,
               draft.class_name, draft.enhanced, draft.repeats)


def _words(needs: Needs) -> str:
    """What a recipe reads of a row, for a message."""
    low, high = needs.images
    number = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
    order = " (references first, the target last)" if low > 1 else ""
    beside = ((SUBJECT_KEY, needs.subject), (ENHANCED_KEY, needs.enhanced))
    return f"{number} image(s){order}" + "".join(f" and {key}" for key, read in beside if read)


def check_number(draft: Draft, needs: Needs) -> None:
    """Notes a number of images that the recipe does not take."""
    low, high = needs.images
    if draft.paths and not low <= len(draft.paths) <= (high or len(draft.paths)):
        draft.problems.append(
            f"expected {_words(Needs(needs.images))} per row for this recipe, got "
            f"{len(draft.paths)}; list that many, or choose another recipe"
        )


def resolve_images(draft: Draft, root: Path, needs: Needs) -> None:
    """Turns what was written into images under the root, the target last."""
    check_number(draft, needs)
    for written in (*draft.subject, *draft.paths):
        if isinstance(written, StoredImage):
            draft.images.append(written)
            continue
        try:
            # resolve() follows symlinks and "..", so what is compared is where the bytes lie.
            path = (root / written).resolve()
            if "\\" in written and not path.exists():  # as Windows writes it
                path = (root / written.replace("\\", "/")).resolve()
            exists = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            draft.problems.append(f"{shorten(written)}: expected an image path, got {error}")
            continue
        if not path.is_relative_to(root):
            draft.problems.append(
                f"{shorten(written)}: expected an image under the data root {root}, got {path} "
                "outside it; move it there, or set data_root to a folder that holds it"
            )
        elif not exists:
            draft.problems.append(
                f"{shorten(written)}: expected an image file, found none at {path}; check the "
                "path, or set data_root to the folder it starts from"
            )
        else:
            draft.images.append(path)
    if draft.subject and draft.images and draft.images[-1] in draft.images[:-1]:
        draft.problems.append(f"{SUBJECT_KEY}: expected other pictures than the target, got it too")


def raise_problems(data: Path, listed: list[Draft], bad: int, total: int) -> None:
    """Raises DataError for the `bad` of `total` rows, of which `listed` are the first."""
    if not bad:
        return
    lines = [f"  {draft.where}: {'; also '.join(draft.problems)}" for draft in listed]
    if bad > len(listed):
        lines.append(f"  ... and {bad - len(listed)} more")
    count = f"{bad} of {total} rows cannot be used" + ("" if total > bad else ", zero usable")
    raise DataError("\n".join([f"{data}: {count}; correct or remove them:", *lines]))
