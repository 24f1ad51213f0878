"""One record of a data set -> a draft of a row: what it says, and what is wrong with it."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dopsd_jax.data.files import (
    CAPTION_EXTENSIONS,
    FOREIGN_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MAX_ASPECT,
    MAX_SIDE,
    ImageSource,
    StoredImage,
    advice,
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
    "images",
    "image",
    "file_name",
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

REPEATS = re.compile(r"(\d{1,9})_")
MAX_REPEATS = 10_000
# Text files that live beside images without being captions.
NOT_CAPTIONS = ("readme", "license", "licence", "copying", "notice")


@dataclass(frozen=True)
class Needs:
    """What a recipe reads of every row.

    Attributes:
        images: Fewest and most images under an image key, the target last; None: no limit.
            Where the fewest is 0, a row may say how large its picture is instead.
        subject: Whether `subject_images` names other pictures of what the target shows.
        enhanced: Whether `enhanced_prompt` holds the teacher's text.
        caption_key: Under which the caption stands; "" for the known names.
    """

    images: tuple[int, int | None] = (1, 1)
    subject: bool = False
    enhanced: bool = False
    caption_key: str = ""

    @property
    def one_pair(self) -> bool:
        """Whether an image and a caption are all, as a folder has them."""
        return self.images[0] == 1 and not self.subject and not self.enhanced


@dataclass
class Draft:
    """A row while it is checked: what was written, and what is wrong with it."""

    where: str
    paths: list[str | StoredImage] = field(default_factory=list)
    subject: list[str | StoredImage] = field(default_factory=list)
    images: list[ImageSource] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    class_name: str | None = None
    enhanced: str | None = None
    repeats: int = 1
    problems: list[str] = field(default_factory=list)


def read_record(where: str, record: Any, needs: Needs) -> Draft:
    """What a record of any kind of data set says.

    Args:
        where: For messages.
        record: Key -> JSON value; images may be `StoredImage`s in place of paths.
        needs: What the recipe reads.
    """
    draft = Draft(where)
    if not isinstance(record, dict):
        draft.problems.append(f"expected a JSON object {{...}}, got {shorten(record)}")
        return draft
    _take_paths(draft, record, needs)
    _take_captions(draft, record, needs.caption_key)
    if needs.subject:
        draft.subject = _read_paths(draft, SUBJECT_KEY, record.get(SUBJECT_KEY))
    if needs.enhanced:
        draft.enhanced = _read_text(draft, ENHANCED_KEY, record.get(ENHANCED_KEY))
    _take_size(draft, record)
    draft.class_name = record.get("class_name")
    if not isinstance(draft.class_name, str | None):
        draft.problems.append(f"class_name: expected text, got {shorten(draft.class_name)}")
    return draft


def _take_paths(draft: Draft, record: dict, needs: Needs) -> None:
    key = next((key for key in IMAGE_KEYS if record.get(key) is not None), None)
    if key is None and needs.images[0] == 0:
        return
    if key is None:
        draft.problems.append(
            f"expected an image under one of the keys {', '.join(IMAGE_KEYS)}, got the keys "
            f"{_keys_of(record)}"
        )
        return
    draft.paths = _read_paths(draft, key, record[key])


def _keys_of(record: dict) -> str:
    keys = (key if value is not None else f"{key} (null)" for key, value in record.items())
    return ", ".join(keys) or "(none)"


def _read_paths(draft: Draft, key: str, value: object) -> list[str | StoredImage]:
    """The usable images of a list, or of a single one."""
    paths = [value] if isinstance(value, str | StoredImage) else value
    if not isinstance(paths, list) or not paths:
        draft.problems.append(f"{key}: expected a list of image paths, got {shorten(value)}")
        return []
    usable = []
    for path in paths:
        if isinstance(path, StoredImage):
            usable.append(path)
        elif not isinstance(path, str) or not path.strip():
            draft.problems.append(f"{key}: expected an image path, got {shorten(path)}")
        elif "://" in path:
            draft.problems.append(
                f"{key}: expected a local path, got {shorten(path)}; download it and give the path"
            )
        else:
            usable.append(path)
    return usable


def _take_captions(draft: Draft, record: dict, chosen: str) -> None:
    # null says "no caption of this kind"; an empty string is taken for a captioning failure.
    names = (chosen,) if chosen else CAPTION_KEYS
    present = {key: record[key] for key in names if record.get(key) is not None}
    if not present and chosen:
        draft.problems.append(
            f"expected a caption under caption_key = {chosen}, got the keys {_keys_of(record)}"
        )
    elif not present:
        draft.problems.append(
            f"expected a caption under at least one of the keys {', '.join(CAPTION_KEYS)}, got the "
            f"keys {_keys_of(record)}; if one of these holds it, name it by caption_key"
        )
    texts = {key: _read_text(draft, key, text) for key, text in present.items()}
    draft.captions = {key: text for key, text in texts.items() if text is not None}


def _read_text(draft: Draft, key: str, text: object) -> str | None:
    """The text, or None and a problem."""
    if not isinstance(text, str):
        draft.problems.append(f"{key}: expected text, got {shorten(text)}")
    elif not text.strip():
        draft.problems.append(
            f"{key}: expected a caption, got {text!r}; write one or remove the key"
        )
    elif any("\ud800" <= char <= "\udfff" for char in text):
        draft.problems.append(f"{key}: expected text, got half of a surrogate pair (\\ud8..)")
    else:
        return text
    return None


def _take_size(draft: Draft, record: dict) -> None:
    # Differs from reference: where images are opened before the run, the written size is checked
    # for syntax only; the file's own size chooses the bucket, since files get resized or rotated
    # after their size was written down.
    for key in SIZE_KEYS:
        sizes = record.get(key)
        for size in sizes if isinstance(sizes, list) else [] if sizes is None else [sizes]:
            if not isinstance(size, str) or not SIZE_PATTERN.fullmatch(size):
                draft.problems.append(f'{key}: expected "832*1264", got {shorten(size)}')
                continue
            sides = [int(side) for side in size.split("*")]
            _set_size(draft, key, sides if key == "w*h" else sides[::-1])
    sides = [record.get(key) for key in ("width", "height")]
    if all(isinstance(side, int) and side > 0 for side in sides):
        _set_size(draft, "width, height", sides)


def _set_size(draft: Draft, key: str, sides: list[int]) -> None:
    if max(sides) > MAX_SIDE:
        draft.problems.append(
            f"{key}: expected sides of at most {MAX_SIDE} pixels, got {max(sides)!s:.30}"
        )
        return
    if max(sides) > MAX_ASPECT * min(sides):
        draft.problems.append(
            f"{key}: expected sides of at most {MAX_ASPECT} to 1, got {sides[0]} x {sides[1]}"
        )
    draft.size = tuple(sides)


def scan_folder(folder: Path) -> list[Draft]:
    """One draft per image, and one per file that looks like data but cannot be a row.

    Subfolders are read too. Where their name begins with a number, `10_cats`, as kohya's scripts
    have it, each of their rows counts so many times.
    """
    folder = folder.absolute()
    drafts: list[Draft] = []
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        files = [Path(place) / n for n in sorted(names) if not n.startswith(".")]  # ._cat.jpg
        files = [path for path in files if path.is_file()]
        drafts += _scan(folder, Path(place), files)
    return drafts


def _scan(folder: Path, place: Path, files: list[Path]) -> list[Draft]:
    """The drafts of the files of one folder."""
    captions = defaultdict(list)
    for path in files:
        if path.suffix.lower() in CAPTION_EXTENSIONS:
            captions[path.stem].append(path)
    image_stems = {path.stem for path in files if path.suffix.lower() in IMAGE_EXTENSIONS}
    other_images = {*Image.registered_extensions(), *FOREIGN_EXTENSIONS} - {*IMAGE_EXTENSIONS}
    number = REPEATS.match(place.name) if place != folder else None
    repeats = int(number[1]) if number else 1
    drafts = []
    for path in files:
        draft = Draft(path.relative_to(folder).as_posix(), repeats=repeats)
        extension = path.suffix.lower()
        if extension in IMAGE_EXTENSIONS:
            draft.paths.append(str(path))
            _read_caption(draft, path, captions[path.stem])
            if not 1 <= repeats <= MAX_REPEATS:
                draft.problems.append(
                    f"expected 1 to {MAX_REPEATS} repeats before _ in the folder's name, got "
                    f"{place.name!s:.60}"
                )
        elif extension in other_images:
            draft.problems.append(
                f"expected an image ending in {', '.join(IMAGE_EXTENSIONS)}, got {extension}; "
                + advice(extension)
            )
        elif extension in CAPTION_EXTENSIONS and path.stem not in image_stems:
            if path.stem.lower() in NOT_CAPTIONS:
                continue
            draft.problems.append(
                f"expected an image named {path.stem} beside this caption, found none; add it, or "
                f"move the {extension} out of the folder"
            )
        else:
            continue
        drafts.append(draft)
    return drafts


def _read_caption(draft: Draft, image: Path, files: list[Path]) -> None:
    if len(files) != 1:
        found = " and ".join(f.name for f in files)
        draft.problems.append(
            f"expected one caption beside it, found {found}; move one away" if files else
            f"expected a caption in {image.stem}.txt beside it, found no such file; write one"
        )
        return
    file = files[0]
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


def shorten(value: object, limit: int = 80) -> str:
    """A value as JSON, cut for a message."""
    text = repr(value)
    if not isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
