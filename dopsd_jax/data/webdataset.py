"""Rows of WebDataset .tar files: members that share a name up to its first dot are one row.

`0001.jpg` with `0001.txt` or `0001.json`; a JSON object says what a line of JSONL would. Members
are found once and read in place; nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dopsd_jax.data.files import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, DataError, StoredImage

SUFFIX = ".tar"


@dataclass
class _Sample:
    """A row: where its members lie, extension -> (offset, size, name)."""

    file: int
    key: str
    members: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)


class WebDataset:
    """The rows of .tar files, in order."""

    reads_images = False

    def __init__(self, files: list[Path]):
        self._files, self._open = files, [file.open("rb") for file in files]
        self._samples: list[_Sample] = []
        self._hash = hashlib.sha256()
        for number, file in enumerate(files):
            try:
                with tarfile.open(file, "r:") as tar:
                    self._take(number, tar)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise DataError(
                    f"{file}: expected an uncompressed .tar file, got {type(error).__name__}: "
                    f"{error!s:.200}"
                ) from error

    def _take(self, number: int, tar: tarfile.TarFile) -> None:
        for member in tar:
            path = PurePosixPath(member.name)
            if not member.isfile() or path.name.startswith("."):
                continue
            stem, dot, extension = path.name.partition(".")
            key, extension = str(path.parent / stem), dot + extension.lower()
            last = self._samples[-1] if self._samples else None
            if last is None or (last.file, last.key) != (number, key):
                last = _Sample(number, key)
                self._samples.append(last)
            if extension in last.members:
                last.twice.append(extension)
            last.members[extension] = member.offset_data, member.size, path.name
            self._hash.update(repr((member.name, member.size)).encode())
            if extension not in IMAGE_EXTENSIONS:
                self._hash.update(self._read(number, member.offset_data, member.size))

    def _read(self, number: int, offset: int, size: int) -> bytes:
        return os.pread(self._open[number].fileno(), size, offset)

    def __len__(self) -> int:
        return len(self._samples)

    def where(self, row: int) -> str:
        sample = self._samples[row]
        return f"{self._files[sample.file].name}:{sample.key}"

    def __getitem__(self, row: int) -> Any:
        sample = self._samples[row]
        images = [e for e in sample.members if e in IMAGE_EXTENSIONS]
        if sample.twice or len(images) != 1:
            found = ", ".join([*sample.members, *sample.twice])
            raise DataError(f"expected one image beside its caption, got {found}")
        record: dict[str, Any] = {}
        if ".json" in sample.members:
            record = self._json(sample)
        for extension in CAPTION_EXTENSIONS:
            if extension in sample.members:
                text = self._text(sample, extension).strip()
                if record.setdefault("caption", text) != text:
                    raise DataError("expected one caption, got two that differ")
        place, name = self._files[sample.file].absolute(), sample.members[images[0]][2]
        record["image"] = StoredImage(
            (str(place), row, "image", None), f"{self.where(row)}{images[0]}", name,
            lambda: self._read(sample.file, *sample.members[images[0]][:2]),
        )
        # What the object says of a path is where the image came from; the one here counts.
        return {"image": record.pop("image")} | {
            k: v for k, v in record.items() if "path" not in k and k != "images"
        }

    def _text(self, sample: _Sample, extension: str) -> str:
        raw = self._read(sample.file, *sample.members[extension][:2])
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{extension}: expected UTF-8 text, got byte 0x{raw[error.start]:02x} at "
                f"{error.start}"
            ) from error

    def _json(self, sample: _Sample) -> dict[str, Any]:
        try:
            record = json.loads(self._text(sample, ".json"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f".json: expected a JSON object, got {error}") from error
        if not isinstance(record, dict):
            raise DataError(f".json: expected a JSON object, got {type(record).__name__}")
        return record

    def identity(self) -> str:
        return self._hash.hexdigest()
