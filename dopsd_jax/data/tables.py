"""Data sets of one small file that is read whole: a JSON array, and CSV with a line of names."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from dopsd_jax.data.files import DataError

METADATA = ("metadata.jsonl", "metadata.csv")  # beside images, as Hugging Face's imagefolder


class JsonArray:
    """The objects of a JSON array."""

    reads_images = False

    def __init__(self, file: Path):
        self._file, raw = file, file.read_bytes()
        self._hash = hashlib.sha256(raw).hexdigest()
        try:
            self._rows: list[Any] = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file}: expected a JSON array of objects, or one object per line, got {error}"
            ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, row: int) -> str:
        return f"{self._file.name}[{row}]"

    def __getitem__(self, row: int) -> Any:
        return self._rows[row]

    def identity(self) -> str:
        return self._hash


# How files begin whose every line would be refused by itself.
BEGINNINGS = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7z", b"\x28\xb5\x2f\xfd": "zstd", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}


def check_is_text(file: Path) -> None:
    """Raises DataError where a file of rows is packed, in UTF-16 or no text at all."""
    with file.open("rb") as opened:
        head = opened.read(4096)
    found = next((name for start, name in BEGINNINGS.items() if head.startswith(start)), "")
    if found or b"\0" in head:
        advice = {"UTF-16": "save it as UTF-8", "": "is it another kind of file?"}.get(
            found, "unpack it; a .tar is read as it is"
        )
        raise DataError(
            f"{file}: expected JSONL, a JSON array, CSV, Parquet or an uncompressed .tar, got "
            f"{found or 'bytes that are no text'}; {advice}"
        )


def is_json_array(file: Path) -> bool:
    """Whether a file begins as a JSON array does."""
    with file.open("rb") as opened:
        return opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


class Csv:
    """Rows of a CSV file whose first line names the columns; an empty cell says nothing."""

    reads_images = False

    def __init__(self, file: Path):
        self._file, raw = file, file.read_bytes()
        self._hash = hashlib.sha256(raw).hexdigest()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}: expected UTF-8 text, got byte 0x{raw[error.start]:02x} at {error.start}; "
                "save the file as UTF-8"
            ) from error
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        self._rows: list[tuple[int, list[str]]] = []
        try:
            self._names = [name.strip() for name in next(reader, [])]
            for cells in reader:
                if cells:
                    self._rows.append((reader.line_num, cells))
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num}: expected CSV, got {error}") from error
        if len(self._names) < 2 or len(set(self._names)) < len(self._names):
            raise DataError(
                f"{file}: expected different names of columns in the first line, such as "
                f"file_name,text, got {','.join(self._names) or 'nothing'!s:.100}"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, row: int) -> str:
        return f"{self._file.name}:{self._rows[row][0]}"

    def __getitem__(self, row: int) -> Any:
        cells = self._rows[row][1]
        if len(cells) != len(self._names):
            raise DataError(
                f"expected {len(self._names)} cells ({','.join(self._names)!s:.100}), got "
                f"{len(cells)}; put quotes around text that holds a comma"
            )
        return {name: cell or None for name, cell in zip(self._names, cells, strict=True)}

    def identity(self) -> str:
        return self._hash
