"""Data sets as other tools write them: metadata beside images, CSV, JSON arrays, kohya, tar."""

import io
import json
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from configs import common
from dopsd_jax.data import drafts
from dopsd_jax.data.buckets import Bucket, repeated
from dopsd_jax.data.datasets import read_data
from dopsd_jax.data.drafts import Needs
from dopsd_jax.data.files import DataError
from dopsd_jax.data.images import read_image
from dopsd_jax.data.indexed import IndexedRows
from dopsd_jax.data.rows import read_rows


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two photographs: a.png and b.png, of 64 x 48 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, photo in (("a", photographs.chelsea()), ("b", photographs.coffee())):
        Image.fromarray(photo).resize((64, 48)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def folder(pictures, tmp_path):
    for file in pictures.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def captions(data, **how):
    """Name of the image -> its caption, read ahead and by an index."""
    found = read_rows(data, **how)
    needs = how.get("needs", Needs())
    indexed = IndexedRows(data, root=how.get("root"), needs=needs, one_shape=False)
    assert [r.captions for r in indexed] == [r.captions for r in found]
    assert [(r.where, r.repeats) for r in indexed] == [(r.where, r.repeats) for r in found]
    return {r.target.name: next(iter(r.captions.values())) for r in found}


WANTED = {"a.png": "a cat, asleep", "b.png": "coffee"}


@pytest.mark.parametrize("name, line, text", [
    ("metadata.jsonl", 2, '{"file_name": "a.png", "text": "a cat, asleep"}\n'
                       '{"file_name": "b.png", "text": "coffee"}\n'),
    ("metadata.csv", 3, 'file_name,text\na.png,"a cat, asleep"\nb.png,coffee\n'),
    ("metadata.csv", 4,
     '\ufeffimage,prompt,other\r\na.png,"a cat, asleep",\r\n\r\nb.png,coffee,1\r\n'),
])
def test_metadata_beside_images_is_read(folder, name, line, text):
    (folder / name).write_text(text)
    assert captions(folder) == WANTED
    first, second = read_rows(folder)
    assert first.target == folder / "a.png"
    assert second.where == f"{name}:{line}"


def test_rows_of_csv_and_arrays_are_named_by_their_place(folder):
    (folder / "rows.csv").write_text('image,text\na.png,"a cat,\nasleep"\nnone.png,coffee\n')
    with pytest.raises(DataError, match=r"rows.csv:4: 'none.png': expected an image file"):
        read_rows(folder / "rows.csv")
    (folder / "rows.json").write_text(json.dumps([{"image": "a.png"}, 3]))
    with pytest.raises(DataError, match=r"rows.json\[0\]: expected a caption under at least one"):
        read_rows(folder / "rows.json")
    with pytest.raises(DataError, match=r"rows.json\[1\]: expected a JSON object"):
        read_rows(folder / "rows.json")


def test_a_json_array_is_read_under_any_name(folder):
    rows = [{"image": name, "caption": text} for name, text in WANTED.items()]
    for name in ("rows.json", "rows.jsonl"):
        (folder / name).write_text("\ufeff\n " + json.dumps(rows, indent=1))
        assert captions(folder / name) == WANTED
    (folder / "rows.json").write_text(json.dumps(rows)[:-1])
    with pytest.raises(DataError, match="expected a JSON array of objects, or one object per line"):
        read_rows(folder / "rows.json")


@pytest.mark.parametrize("text, message", [
    ("image,text\na.png,one,two\n", r"rows.csv:2: expected 2 cells \(image,text\), got 3; put"),
    ("image,image\na.png,b.png\n", "expected different names of columns .* got image,image"),
    ("a.png\n", "expected different names of columns in the first line"),
    ('image,text\na.png,"never closed\n', "rows.csv:2: expected CSV, got unexpected end of data"),
    ("image,text\na.png,\n", "expected a caption under at least one of the keys .*text .null."),
])
def test_bad_csv_is_refused_by_line(folder, text, message):
    (folder / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(folder / "rows.csv")
    (folder / "rows.csv").write_bytes(b"image,text\na.png,caf\xe9\n")
    with pytest.raises(DataError, match="expected UTF-8 text, got byte 0xe9"):
        read_rows(folder / "rows.csv")


def test_two_kinds_of_metadata_are_asked_about(folder):
    for name in ("metadata.jsonl", "metadata.csv"):
        (folder / name).write_text("x")
    with pytest.raises(DataError, match="expected one of metadata.jsonl and metadata.csv, got"):
        read_rows(folder)


def test_another_column_is_named_by_caption_key(folder):
    (folder / "metadata.csv").write_text("file_name,text,blip\na.png,no,a cat\nb.png,no,coffee\n")
    assert captions(folder, needs=Needs(caption_key="blip")) == {"a.png": "a cat",
                                                                  "b.png": "coffee"}
    with pytest.raises(DataError, match="expected a caption under caption_key = cogvlm, got"):
        read_rows(folder, needs=Needs(caption_key="cogvlm"))
    (folder / "metadata.csv").write_text("file_name,blip\na.png,a cat\nb.png,coffee\n")
    with pytest.raises(DataError, match="if one of these holds it, name it by caption_key"):
        read_rows(folder)


def test_captions_of_both_extensions_and_subfolders_are_read(folder):
    (folder / "a.caption").write_text("a cat, asleep")
    (folder / "deeper" / "still").mkdir(parents=True)
    shutil.move(folder / "b.png", folder / "deeper" / "still")
    (folder / "deeper" / "still" / "b.txt").write_text("coffee\n")
    assert captions(folder) == WANTED
    assert [r.where for r in read_rows(folder)] == ["a.png", "deeper/still/b.png"]
    (folder / "a.txt").write_text("another")
    with pytest.raises(DataError, match="a.png: expected one caption beside it, found a.cap"):
        read_rows(folder)


def test_repeats_of_kohya_are_weights_of_rows(folder):
    for name, place in (("a", "3_cats"), ("b", "cups")):
        (folder / place).mkdir()
        shutil.move(folder / f"{name}.png", folder / place)
        (folder / place / f"{name}.txt").write_text(WANTED[f"{name}.png"])
    assert captions(folder) == WANTED
    assert [r.repeats for r in read_rows(folder)] == [3, 1]
    config = common.base()
    config.data, config.buckets, config.batch_size = str(folder), "64x48", 1
    for encode in ("ahead", "online"):
        config.encode = encode
        data = read_data(config, Needs())
        seen = Counter(data.plan.at(step).rows[0] for step in range(40))
        assert seen == {0: 30, 1: 10}
        assert data.plan.epochs(4) == 1 and data.first_rows(2).rows == (0, 1)
    shutil.move(folder / "3_cats", folder / "99999_cats")
    with pytest.raises(DataError, match="expected 1 to 10000 repeats before _ .*got 99999_cats"):
        read_rows(folder)


def test_repeats_and_the_weights_of_data_sets_are_kept_apart(folder, pictures):
    """Three parts of one set, one of another, whatever counts how often within them."""
    (folder / "5_cats").mkdir()
    shutil.move(folder / "a.png", folder / "5_cats")
    (folder / "5_cats" / "a.txt").write_text("a cat")
    (folder / "b.txt").write_text("coffee")
    other = folder.parent / f"{folder.name}_other"
    other.mkdir()
    shutil.copy(pictures / "a.png", other)
    (other / "a.txt").write_text("another cat")
    config = common.base()
    config.data, config.data_weights = f"{folder},{other}", "3,1"
    config.buckets, config.batch_size = "64x48", 1
    plan = read_data(config, Needs()).plan
    seen = Counter(plan.at(step).rows[0] for step in range(960))
    assert seen == {0: 120, 1: 600, 2: 240}


def test_rows_once_come_before_rows_again():
    assignment = {Bucket(64, 64): [0, 2], Bucket(96, 64): [1]}
    found = {b: list(rows) for b, rows in repeated(assignment, {2: 3, 1: 2}).items()}
    assert found == {Bucket(64, 64): [0, 2, 2, 2], Bucket(96, 64): [1, 1]}
    assert repeated(assignment, {}) == assignment


def test_paths_of_windows_are_found(folder):
    (folder / "sub").mkdir()
    shutil.move(folder / "b.png", folder / "sub")
    rows = [{"image": ".\\a.png", "text": "a cat, asleep"},
            {"image": "sub\\b.png", "text": "coffee"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(folder / "rows.jsonl") == WANTED
    (folder / "rows.jsonl").write_text(json.dumps({"image": "..\\..\\x.png", "text": "a"}))
    with pytest.raises(DataError, match="expected an image under the data root"):
        read_rows(folder / "rows.jsonl")


def write_tar(file, members):
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def members(pictures):
    a, b = ((pictures / f"{n}.png").read_bytes() for n in "ab")
    return [("x/0.png", a), ("x/0.txt", b"a cat, asleep\n"), ("x/1.png", b),
            ("x/1.json", b'{"caption": "coffee", "image_path": "was/elsewhere.png", "width": 9}')]


def test_a_webdataset_is_read_in_place(members, pictures, tmp_path):
    file = tmp_path / "0.tar"
    write_tar(file, members)
    write_tar(tmp_path / "1.tar", [("1.png", members[0][1]), ("1.caption", b"a third")])
    rows = read_rows(file)
    assert [next(iter(r.captions.values())) for r in rows] == list(WANTED.values())
    for row, name in zip(rows, "ab", strict=True):
        np.testing.assert_array_equal(read_image(row.target), read_image(pictures / f"{name}.png"))
        assert row.size == (64, 48)
    assert [r.where for r in rows] == ["0.tar:x/0", "0.tar:x/1"]
    assert captions(tmp_path) == {"0.png": "a cat, asleep", "1.png": "a third"}
    assert len(read_rows(tmp_path)) == 3


def test_a_webdataset_is_known_by_what_its_rows_say(members, tmp_path):
    found = []
    for text in (b"a cat", b"a cat", b"a dog"):
        write_tar(tmp_path / "0.tar", [*members[2:], ("2.png", members[0][1]), ("2.txt", text)])
        found.append(IndexedRows(tmp_path / "0.tar", root=None, needs=Needs(),
                                 one_shape=True).identity())
    assert found[0] == found[1] != found[2]


def test_bad_members_are_named(members, tmp_path):
    file = tmp_path / "0.tar"
    a = members[0][1]
    write_tar(file, [
        ("0.png", a), ("0.jpg", a), ("0.txt", b"two images"), ("1.txt", b"none"),
        ("2.png", a), ("2.json", b"[1]"), ("3.png", a), ("3.txt", b"caf\xe9"), ("4.png", a),
        ("5.png", a), ("5.txt", b"one"), ("5.json", b'{"caption": "two"}'),
    ])
    with pytest.raises(DataError) as caught:
        read_rows(file)
    for words in ("0.tar:0: expected one image beside its caption, got .png, .jpg, .txt",
                  "0.tar:1: expected one image", "0.tar:2: .json: expected a JSON object, got list",
                  "0.tar:3: .txt: expected UTF-8 text, got byte 0xe9",
                  "0.tar:4: expected a caption",
                  "0.tar:5: expected one caption, got two that differ", "6 of 6 rows"):
        assert words in str(caught.value)
    with tarfile.open(tmp_path / "1.tar", "w:gz"):
        pass
    (tmp_path / "2.tar").write_bytes(file.read_bytes()[:700])
    for name in ("1.tar", "2.tar"):
        with pytest.raises(DataError, match=f"{name}: expected an uncompressed .tar file"):
            read_rows(tmp_path / name)


@pytest.mark.parametrize("extension, options", [
    ("gif", {}), ("heic", {"quality": 95}), ("jxl", {"lossless": True}), ("avif", {}),
])
def test_images_of_every_kind_are_read(folder, extension, options):
    """HEIC and JPEG XL through the plugins of the extra `images`."""
    want = np.asarray(Image.open(folder / "a.png")).astype(float)
    with Image.open(folder / "a.png") as image:
        image.save(folder / f"a.{extension.upper()}", **options)
    (folder / "a.png").unlink()
    (folder / "b.png").unlink()
    (folder / "a.txt").write_text("a cat")
    (row,) = read_rows(folder)
    assert row.size == (64, 48)
    got = np.asarray(read_image(row.target)).astype(float)
    assert np.abs(got - want).mean() < 8


def test_what_a_plugin_would_open_is_said(folder, monkeypatch):
    monkeypatch.setattr(drafts, "IMAGE_EXTENSIONS", (".png",))
    for name, package in (("a.heic", "pillow-heif, with which HEIF"), ("a.jxl", "pillow-jxl-pl")):
        (folder / name).write_bytes(b"x")
        with pytest.raises(DataError, match=f"got {name[1:]}; install {package}"):
            read_rows(folder)
