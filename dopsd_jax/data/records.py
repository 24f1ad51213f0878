"""Data sets of many records, read by number: JSONL, Parquet and ArrayRecord files.

What a record says is the same in all of them, and in those of tables.py and webdataset.py:
`drafts.read_record` checks it. Where a file holds the images themselves they come as
`StoredImage`s, read when they are asked for.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import importlib
import json
import os
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from dopsd_jax.core.log import log
from dopsd_jax.data import tables, webdataset
from dopsd_jax.data.drafts import IMAGE_KEYS, SUBJECT_KEY
from dopsd_jax.data.files import DataError, StoredImage

PARQUET = ".parquet"
BOM = b"\xef\xbb\xbf"
TFDS_FILES = ("dataset_info.json", "features.json")
BLOCK = 64  # Parquet rows made into Python objects at a time


class Records(Protocol):
    """A data set by row number; threads may share it.

    Attributes:
        reads_images: Whether reading a record reads its images too.
    """

    reads_images: bool

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """A row's name for messages."""

    def __getitem__(self, row: int) -> Any:
        """What a row says: key -> value. Raises DataError without the row's name."""

    def identity(self) -> str:
        """Changes with every change of the records, but is found without reading images."""


def is_tfds(data: Path) -> bool:
    """Whether a folder is a data set as tensorflow_datasets writes it."""
    return all((data / name).is_file() for name in TFDS_FILES)


def parquet_files(data: Path) -> list[Path]:
    """The Parquet files that `data` is or holds."""
    if data.is_dir():
        return sorted(p for p in data.iterdir() if p.suffix == PARQUET)
    return [data] if data.suffix == PARQUET else []


def open_records(data: Path) -> Records | None:
    """The records of a file or folder; None for a folder of images and captions.

    Raises:
        DataError: Nothing there, or a file that is not what its name says.
    """
    if (files := parquet_files(data)) and all(file.is_file() for file in files):
        return Parquet(files)
    if data.is_dir():
        return _open_folder(data)
    if data.is_file():
        return _open_file(data)
    raise DataError(
        f"data: expected a JSONL, JSON, CSV, Parquet or .tar file, or a folder of images, Parquet "
        f"or .tar files or a TFDS data set, got {str(data)!r}, which "
        f"{'is neither, but a device or a pipe' if data.exists() else 'does not exist'}; check "
        "the path"
    )


def _open_folder(data: Path) -> Records | None:
    if is_tfds(data):
        return Tfds(data)
    if tars := sorted(p for p in data.iterdir() if p.suffix == webdataset.SUFFIX):
        return webdataset.WebDataset(tars)
    found = [data / name for name in tables.METADATA if (data / name).is_file()]
    if len(found) > 1:
        raise DataError(
            f"{data}: expected one of {' and '.join(tables.METADATA)}, got both; name the one that "
            "counts, or move the other away"
        )
    return _open_file(found[0]) if found else None


def _open_file(file: Path) -> Records:
    if file.suffix.lower() == webdataset.SUFFIX:
        return webdataset.WebDataset([file])
    tables.check_is_text(file)
    if file.suffix.lower() == ".csv":
        return tables.Csv(file)
    return tables.JsonArray(file) if tables.is_json_array(file) else JsonLines(file)


class JsonLines:
    """A JSON object per line; blank lines do not count. Lines stay on disk."""

    reads_images = False

    def __init__(self, file: Path):
        self._file = file
        self._starts, self._numbers = array("q"), array("q")
        self._hash = hashlib.sha256()
        end = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                self._hash.update(line)
                if (line.removeprefix(BOM) if number == 1 else line).strip():
                    self._starts.append(end)
                    self._numbers.append(number)
                end += len(line)
        self._starts.append(end)
        self._open = file.open("rb")

    def __len__(self) -> int:
        return len(self._numbers)

    def where(self, row: int) -> str:
        return f"{self._file.name}:{self._numbers[row]}"

    def __getitem__(self, row: int) -> Any:
        start, stop = self._starts[row : row + 2]
        # Of several blank lines after it the first newline ends it.
        line = os.pread(self._open.fileno(), stop - start, start)
        return parse_line((line.removeprefix(BOM) if start == 0 else line).rstrip())

    def identity(self) -> str:
        return self._hash.hexdigest()


def parse_line(line: bytes) -> Any:
    """The JSON value of a line of JSONL.

    Raises:
        DataError: No JSON.
    """
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"expected UTF-8 text, got byte 0x{line[error.start]:02x} at column {error.start + 1}; "
            "save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        start = repr(line.decode()[:77])
        raise DataError(
            f"expected one JSON object per line, got malformed JSON at column {error.colno}: "
            f"{error.msg}; the line starts {start}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"expected one JSON object per line, got JSON too large: {error}"
        ) from error


def _stored_image(
    records: Parquet | Tfds, place: Path, row: int, key: str, number: int | None, name: str = ""
) -> StoredImage:
    """The image of a row, or number `number` of its list of images; read when it is opened."""
    return StoredImage(
        (str(place.absolute()), row, key, number),
        f"{records.where(row)}, {key}{'' if number is None else f'[{number}]'}", name,
        functools.partial(records.read_bytes, row, key, number),
    )


def _needed(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise DataError(
            f"{what} needs {module} ({e}); install it with: pip install -e '.[data]'"
        ) from e


class Parquet:
    """Rows of Parquet files as Hugging Face datasets writes them.

    A column of images is a struct of `bytes` and `path`, a list of such, or plain bytes under a
    key of images. The bytes are read, a row group at a time, when an image is opened.
    """

    reads_images = False

    def __init__(self, files: list[Path]):
        pq = _needed("pyarrow.parquet", str(files[0]))
        self._files, self._groups, self._firsts = [], [], []
        self._hash, total = hashlib.sha256(), 0
        for file in files:
            try:
                opened = pq.ParquetFile(file, memory_map=True)
            except Exception as error:  # pyarrow raises several kinds on damaged files
                raise DataError(
                    f"{file}: expected a whole Parquet file, got {type(error).__name__}: "
                    f"{error!s:.200}; download it again"
                ) from error
            self._hash.update(repr((file.name, file.stat().st_size, opened.schema_arrow)).encode())
            for group in range(opened.metadata.num_row_groups):
                row_group = opened.metadata.row_group(group)
                self._hash.update(repr((row_group.num_rows, row_group.total_byte_size)).encode())
                self._groups.append((len(self._files), group))
                self._firsts.append(total)
                total += row_group.num_rows
            self._files.append((file, opened, _image_columns(opened)))
        self._total, self._lock = total, threading.Lock()
        self._words = functools.lru_cache(2)(self._read_words)
        self._block = functools.lru_cache(8)(self._read_block)
        self._images = functools.lru_cache(2)(self._read_images)

    def __len__(self) -> int:
        return self._total

    def _place(self, row: int) -> tuple[int, int]:
        group = bisect.bisect_right(self._firsts, row) - 1
        return group, row - self._firsts[group]

    def where(self, row: int) -> str:
        group, within = self._place(row)
        file, number = self._groups[group]
        before = self._firsts[group] - self._firsts[group - number]
        return f"{self._files[file][0].name}:{before + within + 1}"

    def __getitem__(self, row: int) -> Any:
        group, within = self._place(row)
        with self._lock:
            record = dict(self._block(group, within // BLOCK)[within % BLOCK])
        for key, (_, kind) in self._files[self._groups[group][0]][2].items():
            value = {} if kind == "plain" else record[key]
            if isinstance(value, list):
                if any(isinstance(item, list) for item in value):
                    raise DataError(f"{key}: expected images or a list of images, got lists in it")
                record[key] = [self._stored(row, key, i, item) for i, item in enumerate(value)]
            elif value is not None:
                record[key] = self._stored(row, key, None, value)
        return record

    def _stored(self, row: int, key: str, number: int | None, item: dict | None) -> StoredImage:
        file = self._files[self._groups[self._place(row)[0]][0]][0]
        path = (item or {}).get("path")
        return _stored_image(self, file, row, key, number, Path(path).name if path else "")

    def read_bytes(self, row: int, key: str, number: int | None) -> bytes:
        group, within = self._place(row)
        with self._lock:
            value = self._images(group, key)[within].as_py()
        item = value if number is None else value[number]
        raw = item.get("bytes") if isinstance(item, dict) else item
        if raw is None:
            found = f"the path {item['path']!r} alone" if item else "nothing"
            raise DataError(
                f"{self.where(row)}, {key}: expected an image's bytes, got {found}; save the data "
                "set with its images in it"
            )
        return raw

    def _read_block(self, group: int, block: int) -> list[dict]:
        return self._words(group).slice(block * BLOCK, BLOCK).to_pylist()

    def _read_words(self, group: int):
        """A row group without the bytes of images."""
        file, number = self._groups[group]
        _, opened, images = self._files[file]
        left_out = {leaf for leaf, _ in images.values()}
        leaves = [opened.schema.column(i).path for i in range(len(opened.schema))]
        return opened.read_row_group(number, columns=[x for x in leaves if x not in left_out])

    def _read_images(self, group: int, key: str):
        file, number = self._groups[group]
        _, opened, _ = self._files[file]
        return opened.read_row_group(number, columns=[key]).column(key)

    def identity(self) -> str:
        return self._hash.hexdigest()


def _image_columns(opened) -> dict[str, tuple[str, str]]:
    """Column of images -> the path of its bytes in the file's schema; "struct" or "plain"."""
    found = {}
    for i in range(len(opened.schema)):
        column = opened.schema.column(i)
        key, *rest = column.path.split(".")
        if rest and rest[-1] == "bytes":
            found[key] = column.path, "struct"
        elif (key in (*IMAGE_KEYS, SUBJECT_KEY) and not rest
              and column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE"):
            found[key] = column.path, "plain"
    return found


class Tfds:
    """A data set that tensorflow_datasets wrote as ArrayRecord files; TensorFlow is not needed.

    Of several splits `train` is read.
    """

    reads_images = True

    def __init__(self, directory: Path):
        tfds = _needed("tensorflow_datasets", str(directory))
        _needed("array_record.python.array_record_data_source", str(directory))
        try:
            builder = tfds.builder_from_directory(directory)
            splits = sorted(builder.info.splits)
            split = "train" if "train" in splits else splits[0]
            self._images = {
                name for name, feature in builder.info.features.items()
                if isinstance(getattr(feature, "feature", feature), tfds.features.Image)
            }
            self._source = builder.as_data_source(
                split=split, decoders=dict.fromkeys(self._images, tfds.decode.SkipDecoding())
            )
        except Exception as error:  # of many kinds, NotImplementedError for TFRecord among them
            raise DataError(
                f"{directory}: expected a TFDS data set in ArrayRecord files (file_format="
                f"'array_record'), got {type(error).__name__}: {error!s:.300}"
            ) from error
        if len(splits) > 1:
            log.info("%s: of the splits %s, %s is read", directory, ", ".join(splits), split)
        self._directory, self._name = directory.absolute(), f"{builder.info.name} {split}"
        self._hash = hashlib.sha256()
        for file in sorted(p for p in directory.iterdir() if p.is_file()):
            content = file.read_bytes() if file.name in TFDS_FILES else b""
            self._hash.update(repr((file.name, file.stat().st_size)).encode() + content)

    def __len__(self) -> int:
        return len(self._source)

    def where(self, row: int) -> str:
        return f"{self._name}:{row}"

    def __getitem__(self, row: int) -> Any:
        record = self._source[row]
        return {
            key: self._stored(row, key, value) if key in self._images else _plain(value)
            for key, value in record.items()
        }

    def _stored(self, row: int, key: str, value: Any) -> StoredImage | list[StoredImage]:
        if isinstance(value, bytes):
            return _stored_image(self, self._directory, row, key, None)
        return [_stored_image(self, self._directory, row, key, i) for i in range(len(value))]

    def read_bytes(self, row: int, key: str, number: int | None) -> bytes:
        value = self._source[row][key]
        return value if number is None else value[number]

    def identity(self) -> str:
        return self._hash.hexdigest()


def _plain(value: Any) -> Any:
    """NumPy and bytes as JSON would have them; "" stands for an absent text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape") or None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def iterate(records: Records) -> Iterator[tuple[str, Any]]:
    """(where, what it says or the DataError of one that says nothing readable) of every row."""
    for row in range(len(records)):
        try:
            yield records.where(row), records[row]
        except DataError as error:
            yield records.where(row), error
