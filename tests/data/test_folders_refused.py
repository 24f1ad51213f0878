"""Images and captions of a folder that cannot be used, and what is said of them."""

import io
import os

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dopsd_jax.data import drafts
from dopsd_jax.data.drafts import Needs
from dopsd_jax.data.files import DataError
from dopsd_jax.data.rows import read_rows
from tests.data.written import assert_refused, write_jsonl


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif", "bmp", "avif"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.97])
def test_truncated_image_is_refused(folder, photograph, extension, keep):
    whole = io.BytesIO()
    with Image.open(photograph) as image:
        image.save(whole, {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension))
    file = folder / f"c.{extension}"
    file.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * keep)])
    (folder / "c.txt").write_text("a cat")
    assert_refused(
        ["1 of 3 rows cannot be used", f"c.{extension}: {file}: expected a whole AVIF, BMP, GIF"],
        folder,
    )


def test_file_that_is_no_image_is_refused(folder):
    (folder / "a.jpg").write_text("<html>404</html>")
    assert_refused(["a.jpg: ", "UnidentifiedImageError", "download or export it again"], folder)


def test_image_of_another_format_than_its_name_is_refused(folder, photograph):
    with Image.open(photograph) as image:
        image.save(folder / "a.jpg", "PCX")
    assert_refused(["a.jpg: ", "UnidentifiedImageError"], folder)


def test_broken_png_text_chunk_is_refused(folder):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x")
    Image.new("RGB", (64, 64)).save(folder / "a.png", pnginfo=info)
    png = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(png.replace(b"tEXtcomment\0x", b"tEXtcomment\0y"))
    assert_refused("a.png: expected a whole", folder)


def test_decompression_bomb_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128 * 96 // 2 - 1)
    assert_refused(["2 of 2 rows", "expected at most 12286 pixels", "save it smaller"], folder)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_unusual_bit_depth_is_refused(folder, mode):
    Image.fromarray(np.ones((8, 8), np.uint8)).convert(mode).save(folder / "a.tif")
    assert_refused(f"a.tif: expected 8 or 16 bits per channel, got PIL mode '{mode}'", folder)


def test_missing_and_empty_captions_are_refused(folder):
    os.remove(folder / "a.txt")
    (folder / "b.txt").write_text(" \n")
    assert_refused(
        ["a.jpg: expected a caption in a.txt beside it, found no such file",
         "b.jpg: b.txt: expected a caption, got an empty file"],
        folder,
    )  # fmt: skip


def test_caption_that_is_not_utf8_is_refused_with_its_line(folder):
    (folder / "a.txt").write_bytes(b"a cat\nun caf\xe9")
    assert_refused("a.jpg: a.txt:2: expected UTF-8 text, got byte 0xe9", folder)


def test_caption_without_image_is_refused(folder):
    (folder / "c.txt").write_text("a dog")
    assert_refused("c.txt: expected an image named c beside this caption, found none", folder)


@pytest.mark.parametrize("name", ["c.dng", "c.PCX", "c.eps"])
def test_image_of_another_kind_is_refused(folder, name):
    (folder / name).write_bytes(b"x")
    extension = name[1:].lower()
    assert_refused(f"{name}: expected an image ending in .avif, .bmp, .gif", folder)
    assert_refused(f"got {extension}; convert it", folder)


def test_a_strip_of_an_image_is_refused(folder):
    Image.new("RGB", (3, 700)).save(folder / "a.jpg")
    with pytest.raises(DataError, match=r"a.jpg.*at most 200 to 1, got 3x700 pixels; crop it"):
        read_rows(folder)


def test_what_is_neither_file_nor_folder_is_told_from_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="'/dev/null', which is neither, but a device or a pipe"):
        read_rows("/dev/null")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"data_root: expected a folder, got .*a.txt', which is a"):
        read_rows(tmp_path, root=tmp_path / "a.txt")


@pytest.mark.parametrize("size,expected", [
    ({}, drafts.SQUARE), ({"w*h": "96*64"}, (96, 64)), ({"h*w": ["96 * 64"]}, (64, 96)),
])
def test_a_row_that_needs_no_image_says_its_size_or_is_square(folder, size, expected):
    needs = Needs(images=(0, 1), enhanced=True)
    words = {"caption": "a cat", "enhanced_prompt": "a tabby cat"}
    file = write_jsonl(folder, words | size, words | size | {"image_path": "a.jpg"})
    without, beside = read_rows(file, needs=needs)
    assert (without.target, without.images, without.size) == (None, (), expected)
    assert beside.target == folder / "a.jpg" and beside.size == (128, 96)
    with pytest.raises(DataError, match="expected an image under one of the keys"):
        read_rows(file, needs=Needs(enhanced=True))
    with pytest.raises(DataError, match="w.h: expected sides of at most 200 to 1, got 1 x 201"):
        read_rows(write_jsonl(folder, words | {"w*h": "1*201"}), needs=needs)
