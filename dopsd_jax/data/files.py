"""Image files, opened in full or refused with the reason."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TypeVar

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# A closed list: PIL's other decoders are rarely exercised, and EPS would run Ghostscript.
_FORMATS = {
    ".avif": "AVIF", ".bmp": "BMP", ".gif": "GIF", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG",
    ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}
# Module of an optional plugin for Pillow -> its name on PyPI, its format and extensions.
PLUGINS = {
    "pillow_heif": ("pillow-heif", "HEIF", (".heic", ".heif")),
    "pillow_jxl": ("pillow-jxl-plugin", "JXL", (".jxl",)),
}


def _with_plugins() -> dict[str, str]:
    """Extension -> format of all that can be opened here."""
    found = dict(_FORMATS)
    for module, (_, name, extensions) in PLUGINS.items():
        if importlib.util.find_spec(module) is None:
            continue
        plugin = importlib.import_module(module)  # pillow_jxl registers itself
        if module == "pillow_heif":
            plugin.register_heif_opener()
        found |= dict.fromkeys(extensions, name)
    return dict(sorted(found.items()))


_OPENED = _with_plugins()
IMAGE_FORMATS = tuple(sorted(set(_OPENED.values())))
IMAGE_EXTENSIONS = tuple(_OPENED)
CAPTION_EXTENSIONS = (".txt", ".caption")
# Images that may not be opened here, but which a user takes for part of the data.
FOREIGN_EXTENSIONS = (".heic", ".heif", ".jxl", ".dng")
IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
IMAGE_MODES_16 = ("I;16", "I;16L", "I;16B", "I;16N")

LOG_EVERY_S = 10.0
MAX_SIDE = 2**31 - 1  # pixels; what an index can hold
MAX_ASPECT = 200  # beyond it the vision tower refuses, and resizing would fill the memory

logger = logging.getLogger(__name__)
T = TypeVar("T")


class DataError(ValueError):
    """Data that cannot be trained on."""


@dataclass(frozen=True)
class StoredImage:
    """An image file inside another file, such as a row of a Parquet file.

    Attributes:
        key: Says which it is among all.
        where: The same for messages.
        name: Its file name, where it has kept one, or "".
        read_bytes: Reads it.
    """

    key: tuple
    where: str = field(compare=False)
    name: str = field(compare=False)
    read_bytes: Callable[[], bytes] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.where


ImageSource = Path | StoredImage  # both have name and read_bytes()


def advice(extension: str) -> str:
    """What to do about an image of a kind that is not opened here."""
    for package, name, extensions in PLUGINS.values():
        if extension in extensions:
            return (f"install {package}, with which {name} is read (pip install -e '.[images]'), "
                    "or convert it")
    return "convert it, or move it out of the folder"


def _readable(image: str | ImageSource) -> str | Path | io.BytesIO:
    return io.BytesIO(image.read_bytes()) if isinstance(image, StoredImage) else image


def read_size(image: ImageSource) -> tuple[int, int]:
    """The upright (width, height) that an image file's head tells; it is not decoded.

    Raises:
        DataError: No image, or one of sides that nothing here can train on.
    """
    try:
        with Image.open(_readable(image), formats=IMAGE_FORMATS) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            size = opened.size[::-1] if turned else opened.size
    except Exception as error:
        raise _unreadable(image, error) from error
    return _checked_size(image, size)


def open_image(path: str | ImageSource) -> Image.Image:
    """Decodes one image file fully and turns it upright; several frames: the first.

    Returns:
        An image with a mode of `IMAGE_MODES` or `IMAGE_MODES_16`.

    Raises:
        DataError: The file is missing, no image, truncated, too large or of an unusual bit depth.
    """
    try:
        with Image.open(_readable(path), formats=IMAGE_FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path}: expected at most {2 * Image.MAX_IMAGE_PIXELS} pixels, got an image PIL takes "
            f"for a decompression bomb ({error}); save it smaller"
        ) from error
    except Exception as error:  # On corrupted bytes PIL's decoders raise nearly anything.
        raise _unreadable(path, error) from error
    if image.mode not in IMAGE_MODES + IMAGE_MODES_16:
        raise DataError(
            f"{path}: expected 8 or 16 bits per channel, got PIL mode {image.mode!r}; export it as "
            "8-bit RGB"
        )
    return image


def _unreadable(path: str | ImageSource, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: expected an image file, got no such file; check the path")
    if isinstance(error, DataError):  # of bytes that could not be had
        return error
    # PIL tells no more than the name of the file, or the address of bytes in memory; a plugin,
    # in several lines, how to build it.
    words = "" if isinstance(error, UnidentifiedImageError) else str(error).partition("\n")[0]
    detail = f": {words.strip()}" if words else ""
    return DataError(
        f"{path}: expected a whole {', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]} "
        f"image, got {type(error).__name__}{detail}; download or export it again"
    )


def measure_all(
    paths: Iterable[ImageSource],
) -> dict[ImageSource, tuple[int, int] | DataError]:
    """Decodes every file; returns its upright (width, height), or what is wrong with it."""
    paths = list(paths)
    # Threads suffice: PIL's decoders release the GIL.
    with ThreadPool(min(16, os.cpu_count() or 1)) as pool:
        sizes = pool.imap(_measure, paths, chunksize=8)
        sizes = with_progress(sizes, len(paths), "checked %d of %d images")
        return dict(zip(paths, sizes, strict=True))


def with_progress(items: Iterable[T], total: int, words: str) -> Iterator[T]:
    """The items, with a line in the log every LOG_EVERY_S.

    Args:
        items: What is worked on, or comes of it.
        total: How many there are.
        words: How many of how many, such as "checked %d of %d images".
    """
    start = logged = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - logged > LOG_EVERY_S:
            logged, rate = now, done / (now - start)
            logger.info(words + ", %.0f/s, %.0f s left", done, total, rate, (total - done) / rate)


def _measure(path: ImageSource) -> tuple[int, int] | DataError:
    try:
        return _checked_size(path, open_image(path).size)
    except DataError as error:
        return error


def _checked_size(path: ImageSource, size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(
            f"{path}: expected sides of at most {MAX_ASPECT} to 1, got {width}x{height} pixels; "
            "crop it"
        )
    return width, height
