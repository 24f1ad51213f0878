"""Rows: what is accepted, and the message for everything that is not."""

import gzip
import json
import logging
import os
import re
import shutil

import pytest
from PIL import Image

from dopsd_jax.data import drafts, files
from dopsd_jax.data.drafts import Needs
from dopsd_jax.data.files import DataError
from dopsd_jax.data.rows import read_rows
from tests.data.written import assert_refused, record, write_jsonl

# What is accepted.


def test_folder_rows_come_sorted_with_captions_stripped(folder):
    first, second = read_rows(folder)
    assert (first.where, second.where) == ("a.jpg", "b.jpg")
    assert second.captions == {"caption": "a cat"}
    assert second.size == (128, 96)
    assert second.target == folder / "b.jpg" and second.images == (folder / "b.jpg",)
    assert second.class_name is None


def test_folder_ignores_hidden_files_other_files_and_readme(folder):
    for name in ("README.txt", "license.txt", ".DS_Store", "._a.jpg", "notes.json", "old.npz"):
        (folder / name).write_bytes(b"x")
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "a.jpg", folder / ".thumbnails" / "c.jpg")
    assert len(read_rows(folder)) == 2


def test_folder_reads_upper_case_extensions_and_byte_order_marks(folder):
    os.rename(folder / "a.jpg", folder / "a.JPG")
    os.rename(folder / "a.txt", folder / "a.TXT")
    (folder / "a.TXT").write_bytes(b"\xef\xbb\xbfeine Katze\r\n")
    assert read_rows(folder)[0].captions == {"caption": "eine Katze"}


def test_published_record_is_read_with_captions_in_fixed_order(folder):
    published = {
        "class_name": "Millennium",
        "local_path_list": ["a.jpg"],
        "h*w": "832*1264",
        "short_zh": "一只猫，[V] 风格",
        "short_en": "A cat in [V] style.",
        "user_prompt_en": "Generate an image in [V] style.",
        "detailed_en": "A cat.",
    }
    (row,) = read_rows(write_jsonl(folder, published))
    assert row.where == "train.jsonl:1"
    assert list(row.captions) == ["short_en", "short_zh", "detailed_en", "user_prompt_en"]
    assert row.captions["short_zh"] == "一只猫，[V] 风格"
    assert row.class_name == "Millennium"
    assert row.size == (128, 96)  # the file's, not the written one


def test_caption_order_does_not_depend_on_the_file(folder):
    keys = {"text": "c", "caption": "a", "prompt": "b"}
    (row,) = read_rows(write_jsonl(folder, {"path": "a.jpg", **keys}))
    assert list(row.captions) == ["caption", "prompt", "text"]


@pytest.mark.parametrize("key", drafts.IMAGE_KEYS)
@pytest.mark.parametrize("value", ["a.jpg", ["a.jpg"]])
def test_every_image_key_takes_a_path_or_a_list(folder, key, value):
    (row,) = read_rows(write_jsonl(folder, {key: value, "prompt": "a cat"}))
    assert row.target == folder / "a.jpg"


def test_local_paths_win_over_remote_ones(folder):
    (row,) = read_rows(write_jsonl(folder, record(oss_path_list=["oss://bucket/a.jpg"])))
    assert row.target == folder / "a.jpg"


def test_byte_order_mark_crlf_blank_lines_and_null_captions_are_tolerated(folder):
    line = json.dumps(record(short_zh=None)).encode()
    file = write_jsonl(folder, raw=b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert [row.where for row in read_rows(file)] == ["train.jsonl:1", "train.jsonl:4"]
    assert list(read_rows(file)[0].captions) == ["short_en"]


def test_editing_rows_hold_references_then_target(folder):
    file = write_jsonl(folder, {"path": ["a.jpg", "b.jpg"], "prompt": "x", "h*w": ["1*2", "3 * 4"]})
    (row,) = read_rows(file, needs=Needs((2, 2)))
    assert row.images == (folder / "a.jpg", folder / "b.jpg") and row.target == row.images[1]
    assert read_rows(file, needs=Needs((1, None))) == [row]


def test_size_is_the_targets(folder):
    Image.new("RGB", (30, 20)).save(folder / "c.png")
    file = write_jsonl(folder, {"path": ["a.jpg", "c.png"], "prompt": "x"})
    assert read_rows(file, needs=Needs((2, 2)))[0].size == (30, 20)


def test_relative_paths_start_at_the_given_root(folder):
    (folder / "lists").mkdir()
    file = write_jsonl(folder / "lists", record("a.jpg"), record(str(folder / "b.jpg")))
    assert [row.target.name for row in read_rows(file, root=folder)] == ["a.jpg", "b.jpg"]


def test_size_is_that_of_the_upright_image(folder, photograph):
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright: width and height swap
    with Image.open(photograph) as image:
        for name in ("a.jpg", "a.png", "a.tif", "a.webp"):
            image.save(folder / name, exif=exif)
    sizes = [row.size for row in read_rows(folder) if row.where.startswith("a.")]
    assert sizes == [(96, 128)] * 4


def test_shared_image_is_decoded_once(folder, monkeypatch):
    opened = []
    measure = files._measure
    monkeypatch.setattr(files, "_measure", lambda path: opened.append(path) or measure(path))
    assert len(read_rows(write_jsonl(folder, record(), record(), record("b.jpg")))) == 3
    assert sorted(opened) == [folder / "a.jpg", folder / "b.jpg"]


def test_long_reads_log_their_progress(folder, monkeypatch, caplog):
    monkeypatch.setattr(files, "LOG_EVERY_S", -1.0)
    with caplog.at_level(logging.INFO, logger=files.__name__):
        read_rows(folder)
    assert re.search(r"checked 1 of 2 images, \d+/s, \d+ s left", caplog.text)


# What is refused: paths.


def test_missing_data_is_refused(tmp_path):
    assert_refused(
        ["expected a JSONL, JSON, CSV, Parquet or .tar file", "nowhere", "does not exist"],
        tmp_path / "nowhere",
    )


def test_missing_root_is_refused(folder):
    assert_refused("data_root: expected a folder, got", folder, root=folder / "nowhere")


def test_zero_rows_are_refused(tmp_path):
    assert_refused(
        ["expected an image (.avif, .bmp,", "zero usable rows"], tmp_path
    )
    assert_refused(
        ["expected a JSON object per line, found none", "zero usable rows"],
        write_jsonl(tmp_path, raw=b"\n \n"),
    )
    (tmp_path / "empty.csv").write_text("file_name,text\n")
    assert_refused(["expected rows, found none", "zero usable rows"], tmp_path / "empty.csv")


@pytest.mark.parametrize("raw, found", [
    (gzip.compress(b'{"caption": "a"}\n' * 9, mtime=0),
     "gzip; unpack it; a .tar is read as it is"),
    (b"PK\x03\x04" + b"\n" * 9, "zip; unpack it"),
    ('{"caption": "a"}'.encode("utf-16"), "UTF-16; save it as UTF-8"),
    (b'{"caption": "a"}\n\0\n', "bytes that are no text; is it another kind of file"),
], ids=["gzip", "zip", "UTF-16", "binary"])  # bytes in a name would differ between processes
def test_what_is_no_text_is_refused_once_not_line_by_line(tmp_path, raw, found):
    for name in ("x.tar.gz", "x.csv", "x.json"):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=re.escape(found)) as e:
            read_rows(tmp_path / name)
        assert "\n" not in str(e.value)


def test_missing_image_file_is_refused(folder):
    assert_refused(
        ["train.jsonl:2: 'c.jpg': expected an image file, found none at", str(folder / "c.jpg")],
        write_jsonl(folder, record(), record("c.jpg")),
    )


@pytest.mark.parametrize("path", ["\0.jpg", "x" * 5000 + ".jpg"])
def test_impossible_paths_are_refused(folder, path):
    assert_refused("expected an image path, got", write_jsonl(folder, record(path)))


@pytest.mark.parametrize("how", ["absolute", "dots", "symlink"])
def test_path_outside_root_is_refused(folder, how):
    root = folder / "root"
    root.mkdir()
    os.symlink(folder / "a.jpg", root / "link.jpg")
    path = {"absolute": str(folder / "a.jpg"), "dots": "../a.jpg", "symlink": "link.jpg"}[how]
    file = write_jsonl(root, record(path))
    assert_refused(
        [f"train.jsonl:1: '{path}'", f"expected an image under the data root {root}",
         f"got {folder / 'a.jpg'} outside it", "set data_root to a folder that holds it"],
        file,
    )  # fmt: skip
    if how == "absolute":
        assert len(read_rows(file, root=folder)) == 1


def test_symlink_out_of_a_folder_is_refused_unless_the_root_holds_it(folder):
    inner = folder / "inner"
    inner.mkdir()
    os.symlink(folder / "a.jpg", inner / "a.jpg")
    (inner / "a.txt").write_text("a cat")
    assert_refused("a.jpg: ", inner)
    assert read_rows(inner, root=folder)[0].target == folder / "a.jpg"


def test_wrong_number_of_images_is_refused(folder):
    assert_refused(
        "train.jsonl:1: expected 1 image(s) per row for this recipe, got 2",
        write_jsonl(folder, {"path": ["a.jpg", "b.jpg"], "prompt": "x"}),
    )
    assert_refused(
        "train.jsonl:1: expected at least 2 image(s) (references first, the target last) per row "
        "for this recipe, got 1; list that many, or choose another recipe",
        write_jsonl(folder, record()), needs=Needs((2, None)),
    )


def test_a_folder_is_refused_where_a_row_must_hold_more(folder):
    for needs, words in (
        (Needs((2, None)), "reads at least 2 image(s) (references first, the target last) of"),
        (Needs(subject=True), "reads 1 image(s) and subject_images of every row, got a folder"),
        (Needs(enhanced=True), "reads 1 image(s) and enhanced_prompt of every row"),
    ):
        assert_refused(f"expected a JSONL file, because this recipe {words}", folder, needs=needs)


def test_other_pictures_of_the_subject_come_before_the_target(folder):
    for written in ("b.jpg", ["b.jpg"]):
        file = write_jsonl(folder, record(subject_images=written))
        (row,) = read_rows(file, needs=Needs(subject=True))
        assert row.images == (folder / "b.jpg", folder / "a.jpg")
        assert row.references == (folder / "b.jpg",) and row.target == folder / "a.jpg"
        assert read_rows(file)[0].images == (folder / "a.jpg",)  # ignored by other recipes


def test_bad_subject_images_are_refused(folder):
    for written, words in (
        (None, "subject_images: expected a list of image paths, got null"),
        ([], "subject_images: expected a list of image paths, got []"),
        ([3], "subject_images: expected an image path, got 3"),
        (["c.jpg"], "'c.jpg': expected an image file, found none"),
        (["b.jpg", "a.jpg"], "subject_images: expected other pictures than the target, got it too"),
    ):
        file = write_jsonl(folder, record(subject_images=written))
        assert_refused(f"train.jsonl:1: {words}", file, needs=Needs(subject=True))


def test_the_enhanced_prompt_is_the_teachers(folder):
    file = write_jsonl(folder, record(enhanced_prompt="a tabby cat on a sofa"))
    assert read_rows(file, needs=Needs(enhanced=True))[0].enhanced == "a tabby cat on a sofa"
    assert read_rows(file)[0].enhanced is None
    for written, words in ((None, "expected text, got null"), (" ", "expected a caption, got ' '")):
        file = write_jsonl(folder, record(enhanced_prompt=written))
        assert_refused(f"train.jsonl:1: enhanced_prompt: {words}", file, needs=Needs(enhanced=True))


# What is refused: lines.


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"path": "a.jpg",', "got malformed JSON at column"),
        (b"[" * 100_000, "got JSON too large"),
        (b'["a.jpg", "a cat"]', 'expected a JSON object {...}, got ["a.jpg", "a cat"]'),
        (b"3", "expected a JSON object {...}, got 3"),
        (b'{"prompt": "\xff"}', "expected UTF-8 text, got byte 0xff at column 13"),
        (record(None), "local_path_list: expected an image path, got null"),
        ({"prompt": "x"}, "expected an image under one of the keys local_path_list, local_paths"),
        ({"prompt": "x", "img": "a.jpg"}, "got the keys prompt, img"),
        ({"prompt": "x", "path": []}, "path: expected a list of image paths, got []"),
        ({"prompt": "x", "path": {}}, "path: expected a list of image paths, got {}"),
        ({"prompt": "x", "path": ["a.jpg", 3]}, "path: expected an image path, got 3"),
        ({"prompt": "x", "path": " "}, "path: expected an image path, got ' '"),
        ({"prompt": "x", "path": "oss://b/a.jpg"}, "expected a local path, got 'oss://b/a.jpg'"),
        ({"path": "a.jpg"}, "expected a caption under at least one of the keys short_en"),
        ({"path": "a.jpg", "captions": "x"}, "got the keys path, captions"),
        ({"path": "a.jpg", "prompt": None}, "expected a caption under at least one"),
        (record(short_en=""), "short_en: expected a caption, got ''"),
        (record(medium_zh=" \n"), r"medium_zh: expected a caption, got ' \n'"),
        (record(short_en=["a"]), 'short_en: expected text, got ["a"]'),
        (record(short_en="\ud83d"), "short_en: expected text, got half of a surrogate pair"),
        (record(class_name=3), "class_name: expected text, got 3"),
        (record(**{"h*w": "832x1264"}), "h*w: expected \"832*1264\", got '832x1264'"),
        (record(**{"w*h": ["8*8", "0*8"]}), "w*h: expected \"832*1264\", got '0*8'"),
        (record(**{"h*w": "832*1264px"}), "h*w: expected \"832*1264\", got '832*1264px'"),
        (record(**{"h*w": 832}), 'h*w: expected "832*1264", got 832'),
    ],
)
def test_bad_line_is_refused_with_its_number(folder, line, expected):
    message = assert_refused(expected, write_jsonl(folder, record(), line, record()))
    assert "1 of 3 rows cannot be used" in message
    assert "train.jsonl:2: " in message and "train.jsonl:1: " not in message


def test_all_bad_rows_are_reported_at_once_and_cut_at_twenty(folder):
    file = write_jsonl(folder, record(), *[record("gone.jpg", short_en="")] * 25)
    message = assert_refused(["25 of 26 rows cannot be used", "\n  ... and 5 more"], file)
    listed = re.findall(r"train.jsonl:(\d+): short_en: .*; also 'gone.jpg': ", message)
    assert listed == [str(n) for n in range(2, 22)]


def test_report_says_when_no_row_is_usable(folder):
    assert_refused("1 of 1 rows cannot be used, zero usable", write_jsonl(folder, record("c.jpg")))
