"""Image-text rows: a JSONL file or a folder of images -> rows that are known to be usable.

Every row is checked and every image fully decoded before training starts, and all bad rows are
reported together.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dopsd_jax.data.files import (
    FOREIGN_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MAX_ASPECT,
    DataError,
    measure_all,
)

# In order of precedence: published files may carry a local list and the remote one it came from.
IMAGE_KEYS = (
    "local_path_list",
    "local_paths",
    "image_path_list",
    "image_paths",
    "image_path",
    "path",
    "oss_path_list",
)
CAPTION_KEYS = tuple(
    f"{kind}_{language}"
    for kind in ("short", "medium", "detailed", "user_prompt")
    for language in ("en", "zh")
) + ("caption", "prompt", "text")
# What some recipes show the teacher in their place or beside them.
SUBJECT_KEY = "subject_images"
ENHANCED_KEY = "enhanced_prompt"
SIZE_KEYS = ("h*w", "w*h")
SQUARE = (1, 1)  # size of a row that says nothing
SIZE_PATTERN = re.compile(r"\s*[1-9]\d*\s*\*\s*[1-9]\d*\s*")

# Text files that live beside images without being captions.
NOT_CAPTIONS = ("readme", "license", "licence", "copying", "notice")

MAX_LISTED = 20


@dataclass(frozen=True)
class Needs:
    """What a recipe reads of every row.

    Attributes:
        images: Fewest and most images under an image key, the target last; None: no limit.
            Where the fewest is 0, a row may say how large its picture is instead.
        subject: Whether `subject_images` names other pictures of what the target shows.
        enhanced: Whether `enhanced_prompt` holds the teacher's text.
    """

    images: tuple[int, int | None] = (1, 1)
    subject: bool = False
    enhanced: bool = False

    @property
    def one_pair(self) -> bool:
        """Whether an image and a caption are all, as a folder has them."""
        return self.images[0] == 1 and not self.subject and not self.enhanced


@dataclass(frozen=True)
class Row:
    """One image-text pair, and what a recipe shows beside it.

    Attributes:
        where: "train.jsonl:3" or "cat.jpg", for messages.
        images: Existing files: references, or other pictures of the subject; the last one is the
            target. Empty where a recipe needs none.
        captions: Caption by key, never empty, in the order of `CAPTION_KEYS`.
        size: (width, height) of the target in pixels, upright; without one as the row says it, or
            SQUARE.
        class_name: What `[V]` stands for, or None.
        enhanced: The teacher's text, of recipes that read one.
    """

    where: str
    images: tuple[Path, ...]
    captions: dict[str, str]
    size: tuple[int, int]
    class_name: str | None
    enhanced: str | None = None

    @property
    def target(self) -> Path | None:
        return self.images[-1] if self.images else None

    @property
    def references(self) -> tuple[Path, ...]:
        return self.images[:-1]


@dataclass
class _Draft:
    """A row while it is checked: what was written, and what is wrong with it."""

    where: str
    paths: list[str] = field(default_factory=list)
    subject: list[str] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    class_name: str | None = None
    enhanced: str | None = None
    problems: list[str] = field(default_factory=list)


def read_rows(
    data: str | Path, *, root: str | Path | None = None, needs: Needs = Needs()
) -> list[Row]:
    """Reads and checks every row of a data set.

    Args:
        data: A JSONL file of the published format, or a folder of images with a .txt caption
            beside each (subfolders are not read).
        root: Folder that relative paths start from and that no image may lie outside of. By
            default the folder itself, or the folder of the JSONL file.
        needs: What the recipe reads of every row; what else a row holds is ignored.

    Returns:
        Rows in file order (JSONL) or sorted by name (folder).

    Raises:
        DataError: All bad rows together, each with where, what was expected and what came.

    Source: D-OPSD, z-image-turbo_self-distill-vlm/dataset.py and local_paths.py.
        Differs from reference: a row that cannot be used is an error before training starts, not
        replaced by another row while it runs; a row with more images than the recipe uses is an
        error, not cut to the first.
    """
    data = Path(data).expanduser()
    if data.is_dir() and not needs.one_pair:
        raise DataError(
            f"{data}: expected a JSONL file, because this recipe reads {_words(needs)} of every "
            "row, got a folder, whose rows are one image and one caption"
        )
    if data.is_dir():
        drafts = _scan_folder(data)
        expected = f"an image ({', '.join(IMAGE_EXTENSIONS)}; subfolders are not read)"
    elif data.is_file():
        drafts = _parse_jsonl(data, needs)
        expected = "a JSON object per line"
    else:
        raise DataError(
            f"data: expected a JSONL file or a folder of images, got {str(data)!r}, which "
            f"{'is neither, but a device or a pipe' if data.exists() else 'does not exist'}; check "
            "the path"
        )
    if not drafts:
        raise DataError(f"{data}: expected {expected}, found none; zero usable rows")

    root = Path(root if root is not None else data if data.is_dir() else data.parent)
    root = root.expanduser().resolve()
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise DataError(f"data_root: expected a folder, got {str(root)!r}, which {found}")
    for draft in drafts:
        _resolve_images(draft, root, needs)
    # Rows may share an image; each file is decoded once.
    sizes = measure_all(dict.fromkeys(path for draft in drafts for path in draft.images))
    for draft in drafts:
        broken = (sizes[path] for path in dict.fromkeys(draft.images))
        draft.problems += [str(error) for error in broken if isinstance(error, DataError)]
    _raise_problems(data, drafts)
    return [
        Row(d.where, tuple(d.images), d.captions,
            sizes[d.images[-1]] if d.images else d.size or SQUARE, d.class_name, d.enhanced)
        for d in drafts
    ]


def _words(needs: Needs) -> str:
    """What a recipe reads of a row, for a message."""
    low, high = needs.images
    number = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
    order = " (references first, the target last)" if low > 1 else ""
    beside = ((SUBJECT_KEY, needs.subject), (ENHANCED_KEY, needs.enhanced))
    return f"{number} image(s){order}" + "".join(f" and {key}" for key, read in beside if read)


def _parse_jsonl(file: Path, needs: Needs) -> list[_Draft]:
    """One draft per non-blank line."""
    drafts = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                draft = _Draft(f"{file.name}:{number}")
                _parse_line(draft, line, needs)
                drafts.append(draft)
    return drafts


def _parse_line(draft: _Draft, line: bytes, needs: Needs) -> None:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        draft.problems.append(
            f"expected UTF-8 text, got byte 0x{line[error.start]:02x} at column {error.start + 1}; "
            "save the file as UTF-8"
        )
        return
    except json.JSONDecodeError as error:
        draft.problems.append(
            f"expected one JSON object per line, got malformed JSON at column {error.colno}: "
            f"{error.msg}; the line starts {_shorten(line.decode())}"
        )
        return
    except (ValueError, RecursionError) as error:
        draft.problems.append(f"expected one JSON object per line, got JSON too large: {error}")
        return
    if not isinstance(record, dict):
        draft.problems.append(f"expected a JSON object {{...}}, got {_shorten(record)}")
        return
    _take_paths(draft, record, needs)
    _take_captions(draft, record)
    if needs.subject:
        draft.subject = _read_paths(draft, SUBJECT_KEY, record.get(SUBJECT_KEY))
    if needs.enhanced:
        draft.enhanced = _read_text(draft, ENHANCED_KEY, record.get(ENHANCED_KEY))
    _take_size(draft, record)
    draft.class_name = record.get("class_name")
    if not isinstance(draft.class_name, str | None):
        draft.problems.append(f"class_name: expected text, got {_shorten(draft.class_name)}")


def _take_paths(draft: _Draft, record: dict, needs: Needs) -> None:
    key = next((key for key in IMAGE_KEYS if record.get(key) is not None), None)
    if key is None and needs.images[0] == 0:
        return
    if key is None:
        draft.problems.append(
            f"expected an image under one of the keys {', '.join(IMAGE_KEYS)}, got the keys "
            f"{', '.join(record) or '(none)'}"
        )
        return
    draft.paths = _read_paths(draft, key, record[key])


def _read_paths(draft: _Draft, key: str, value: object) -> list[str]:
    """The usable paths of a list, or of a single path."""
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths:
        draft.problems.append(f"{key}: expected a list of image paths, got {_shorten(value)}")
        return []
    usable = []
    for path in paths:
        if not isinstance(path, str) or not path.strip():
            draft.problems.append(f"{key}: expected an image path, got {_shorten(path)}")
        elif "://" in path:
            draft.problems.append(
                f"{key}: expected a local path, got {_shorten(path)}; download it and give the path"
            )
        else:
            usable.append(path)
    return usable


def _take_captions(draft: _Draft, record: dict) -> None:
    # null says "no caption of this kind"; an empty string is taken for a captioning failure.
    present = {key: record[key] for key in CAPTION_KEYS if record.get(key) is not None}
    if not present:
        draft.problems.append(
            f"expected a caption under at least one of the keys {', '.join(CAPTION_KEYS)}, got the "
            f"keys {', '.join(record) or '(none)'}"
        )
    texts = {key: _read_text(draft, key, text) for key, text in present.items()}
    draft.captions = {key: text for key, text in texts.items() if text is not None}


def _read_text(draft: _Draft, key: str, text: object) -> str | None:
    """The text, or None and a problem."""
    if not isinstance(text, str):
        draft.problems.append(f"{key}: expected text, got {_shorten(text)}")
    elif not text.strip():
        draft.problems.append(
            f"{key}: expected a caption, got {text!r}; write one or remove the key"
        )
    elif any("\ud800" <= char <= "\udfff" for char in text):
        draft.problems.append(f"{key}: expected text, got half of a surrogate pair (\\ud8..)")
    else:
        return text
    return None


def _take_size(draft: _Draft, record: dict) -> None:
    # Differs from reference: where there is an image, the written size is checked for syntax only;
    # the file's own size chooses the bucket, since files get resized or rotated after their size
    # was written down.
    for key in SIZE_KEYS:
        sizes = record.get(key)
        for size in sizes if isinstance(sizes, list) else [] if sizes is None else [sizes]:
            if not isinstance(size, str) or not SIZE_PATTERN.fullmatch(size):
                draft.problems.append(f'{key}: expected "832*1264", got {_shorten(size)}')
                continue
            sides = [int(side) for side in size.split("*")]
            if max(sides) > MAX_ASPECT * min(sides):
                draft.problems.append(
                    f"{key}: expected sides of at most {MAX_ASPECT} to 1, got {_shorten(size)}"
                )
            draft.size = tuple(sides if key == "w*h" else reversed(sides))


def _scan_folder(folder: Path) -> list[_Draft]:
    """One draft per image, and one per file that looks like data but cannot be a row."""
    files = sorted(path for path in folder.absolute().iterdir() if path.is_file())
    files = [path for path in files if not path.name.startswith(".")]  # .DS_Store, ._cat.jpg
    captions = {path.stem: path for path in files if path.suffix.lower() == ".txt"}
    image_stems = {path.stem for path in files if path.suffix.lower() in IMAGE_EXTENSIONS}
    other_images = {*Image.registered_extensions(), *FOREIGN_EXTENSIONS} - {*IMAGE_EXTENSIONS}
    drafts = []
    for path in files:
        draft = _Draft(path.name)
        extension = path.suffix.lower()
        if extension in IMAGE_EXTENSIONS:
            draft.paths.append(str(path))
            _read_caption(draft, path, captions.get(path.stem))
        elif extension in other_images:
            draft.problems.append(
                f"expected an image ending in {', '.join(IMAGE_EXTENSIONS)}, got {extension}; "
                "convert it, or move it out of the folder"
            )
        elif extension == ".txt" and path.stem not in image_stems:
            if path.stem.lower() in NOT_CAPTIONS:
                continue
            draft.problems.append(
                f"expected an image named {path.stem} beside this caption, found none; add it, or "
                "move the .txt out of the folder"
            )
        else:
            continue
        drafts.append(draft)
    return drafts


def _read_caption(draft: _Draft, image: Path, file: Path | None) -> None:
    if file is None:
        draft.problems.append(
            f"expected a caption in {image.stem}.txt beside it, found no such file; write one"
        )
        return
    try:
        text = file.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        draft.problems.append(
            f"{file.name}:{line}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}; "
            "save the file as UTF-8"
        )
        return
    if text:
        draft.captions["caption"] = text
    else:
        draft.problems.append(f"{file.name}: expected a caption, got an empty file; write one")


def _resolve_images(draft: _Draft, root: Path, needs: Needs) -> None:
    """Turns written paths into files under the root, the target last."""
    low, high = needs.images
    if draft.paths and not low <= len(draft.paths) <= (high or len(draft.paths)):
        draft.problems.append(
            f"expected {_words(Needs(needs.images))} per row for this recipe, got "
            f"{len(draft.paths)}; list that many, or choose another recipe"
        )
    for written in (*draft.subject, *draft.paths):
        try:
            # resolve() follows symlinks and "..", so what is compared is where the bytes lie.
            path = (root / written).resolve()
            exists = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            draft.problems.append(f"{_shorten(written)}: expected an image path, got {error}")
            continue
        if not path.is_relative_to(root):
            draft.problems.append(
                f"{_shorten(written)}: expected an image under the data root {root}, got {path} "
                "outside it; move it there, or set data_root to a folder that holds it"
            )
        elif not exists:
            draft.problems.append(
                f"{_shorten(written)}: expected an image file, found none at {path}; check the "
                "path, or set data_root to the folder it starts from"
            )
        else:
            draft.images.append(path)
    if draft.subject and draft.images and draft.images[-1] in draft.images[:-1]:
        draft.problems.append(f"{SUBJECT_KEY}: expected other pictures than the target, got it too")


def _raise_problems(data: Path, drafts: list[_Draft]) -> None:
    bad = [draft for draft in drafts if draft.problems]
    if not bad:
        return
    lines = [f"  {draft.where}: {'; also '.join(draft.problems)}" for draft in bad[:MAX_LISTED]]
    if len(bad) > MAX_LISTED:
        lines.append(f"  ... and {len(bad) - MAX_LISTED} more")
    usable = len(drafts) - len(bad)
    count = f"{len(bad)} of {len(drafts)} rows cannot be used" + ("" if usable else ", zero usable")
    raise DataError("\n".join([f"{data}: {count}; correct or remove them:", *lines]))


def _shorten(value: object, limit: int = 80) -> str:
    """A value as JSON, cut for a message."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
