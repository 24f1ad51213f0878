"""Parquet and ArrayRecord files say the same as JSONL; an index says the same as reading all."""

import io
import json
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dopsd_jax.data.drafts import Needs
from dopsd_jax.data.files import DataError, read_size
from dopsd_jax.data.images import read_image
from dopsd_jax.data.indexed import IndexedRows
from dopsd_jax.data.records import open_records
from dopsd_jax.data.rows import read_rows

SIZES = [(64, 48), (32, 80), (48, 48), (50, 40), (64, 64)]
CAPTIONS = ["a cat", "eine Katze", "猫", "a dog", "a fox"]


@pytest.fixture(scope="module")
def pngs():
    """Five image files as bytes."""
    found = []
    for i, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
        found.append(out.getvalue())
    return found


@pytest.fixture
def jsonl(pngs, tmp_path):
    lines = []
    for i, (png, caption) in enumerate(zip(pngs, CAPTIONS, strict=True)):
        (tmp_path / f"{i}.png").write_bytes(png)
        lines.append(json.dumps({"image_path": f"{i}.png", "caption": caption}))
    (tmp_path / "train.jsonl").write_text("\n\n".join(lines) + "\n")
    return tmp_path / "train.jsonl"


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(file, image, captions=CAPTIONS, kind=IMAGE, row_group_size=2):
    file.parent.mkdir(exist_ok=True)
    table = pa.table({"image": pa.array(image, kind), "caption": captions})
    pq.write_table(table, file, row_group_size=row_group_size)
    return file


@pytest.fixture
def parquet(pngs, tmp_path):
    """Two shards of several row groups, as datasets writes them."""
    rows = [{"bytes": png, "path": f"{i}.png"} for i, png in enumerate(pngs)]
    write_parquet(tmp_path / "hf" / "train-00000-of-00002.parquet", rows[:3], CAPTIONS[:3])
    write_parquet(tmp_path / "hf" / "train-00001-of-00002.parquet", rows[3:], CAPTIONS[3:])
    return tmp_path / "hf"


class Shots(tfds.core.GeneratorBasedBuilder):
    """A data set as a user would prepare one, without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    pngs = ()
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "caption": tfds.features.Text()}
    )

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=self.features, disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, png in enumerate(self.pngs):
            yield i, {"image": io.BytesIO(png), "caption": CAPTIONS[i]}


@pytest.fixture(scope="module")
def array_records(pngs, tmp_path_factory):
    Shots.pngs = pngs
    directory = tmp_path_factory.mktemp("tfds")
    Shots(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory / "shots" / "1.0.0"


@pytest.fixture(params=["parquet", "array_records"])
def stored(request):
    return request.getfixturevalue(request.param)


def test_rows_are_those_of_the_same_jsonl(stored, jsonl):
    expected, found = read_rows(jsonl), read_rows(stored)
    assert [(r.captions, r.size) for r in found] == [(r.captions, r.size) for r in expected]
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(read_image(one.target), read_image(other.target))
        assert one.target.read_bytes() == other.target.read_bytes()


def test_a_single_parquet_file_and_its_file_names(parquet):
    rows = read_rows(parquet / "train-00001-of-00002.parquet")
    assert [(r.where, r.target.name) for r in rows] == [
        ("train-00001-of-00002.parquet:1", "3.png"), ("train-00001-of-00002.parquet:2", "4.png"),
    ]
    assert rows[0].target != rows[1].target and len({r.target for r in rows}) == 2


def test_a_column_of_plain_bytes_and_one_of_lists(pngs, tmp_path):
    (plain,) = read_rows(write_parquet(tmp_path / "a" / "a.parquet", pngs[:1], CAPTIONS[:1],
                                       pa.binary()))
    assert plain.size == SIZES[0]
    pairs = [[{"bytes": pngs[0], "path": None}, {"bytes": pngs[1], "path": None}]]
    table = pa.table({"images": pa.array(pairs, pa.list_(IMAGE)), "caption": CAPTIONS[:1]})
    pq.write_table(table, tmp_path / "b.parquet")
    (edit,) = read_rows(tmp_path / "b.parquet", needs=Needs(images=(2, None)))
    assert len(edit.references) == 1 and edit.size == SIZES[1]


def test_bad_stored_rows_are_named_together(pngs, tmp_path):
    rows = [{"bytes": pngs[0]}, {"bytes": pngs[1][:200]}, None, {"path": "x.png"}]
    file = write_parquet(tmp_path / "d" / "d.parquet", rows, ["a", "b", "c", None])
    with pytest.raises(DataError) as error:
        read_rows(file)
    text = str(error.value)
    assert "3 of 4 rows cannot be used" in text
    assert "d.parquet:2: d.parquet:2, image: expected a whole" in text
    assert "d.parquet:3: expected an image under one of the keys" in text
    assert "d.parquet:4: expected a caption" in text and "keys image, caption (null)" in text
    assert "BytesIO" not in text


def test_lists_of_lists_of_images_and_a_file_without_rows_are_refused(pngs, tmp_path):
    nested = pa.table({"image": pa.array([[[{"bytes": pngs[0], "path": None}]]]), "caption": ["a"]})
    pq.write_table(nested, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet:1: image: expected .* a list of images, got li"):
        read_rows(tmp_path / "a.parquet")
    pq.write_table(nested.slice(0, 0), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet: expected rows, found none"):
        read_rows(tmp_path / "b.parquet")


def test_an_image_that_is_only_a_path_is_refused(tmp_path):
    file = write_parquet(tmp_path / "d" / "d.parquet", [{"path": "x.png"}], ["a"])
    with pytest.raises(DataError, match=r"expected an image's bytes, got the path 'x.png' alone"):
        read_rows(file)


def test_damaged_files_are_named(parquet, array_records, tmp_path):
    file = parquet / "train-00000-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-00000.*expected a whole Parquet file"):
        read_rows(parquet)
    for original in array_records.iterdir():
        (tmp_path / original.name).write_bytes(original.read_bytes())
    info = tmp_path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match="expected a TFDS data set in ArrayRecord files"):
        read_rows(tmp_path)


@pytest.mark.parametrize("one_shape", [True, False])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_records", "folder"])
def test_an_index_has_the_same_rows(kind, one_shape, jsonl, request):
    data = jsonl if kind == "folder" else request.getfixturevalue(kind)
    if kind == "folder":
        for i, caption in enumerate(CAPTIONS):
            (jsonl.parent / f"{i}.txt").write_text(caption)
        jsonl.unlink()
        data = jsonl.parent
    expected = read_rows(data)
    index = IndexedRows(data, root=None, needs=Needs(), one_shape=one_shape)
    assert len(index) == len(expected)
    for one, other in zip(expected, index, strict=True):
        assert (one.where, one.captions, one.target) == (other.where, other.captions, other.target)
        if not one_shape:
            assert one.size == other.size
    assert list(index.shapes()) == [
        ((1, 1) if one_shape else row.size, 0) for row in expected
    ]


def test_an_index_says_what_is_wrong_before_a_run(jsonl):
    lines = jsonl.read_text().split("\n\n")
    lines[1], lines[3] = "{", json.dumps({"image_path": "3.png"})
    jsonl.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"(?s)2 of 5 rows.*train.jsonl:2.*train.jsonl:4"):
        IndexedRows(jsonl, root=None, needs=Needs(), one_shape=True)


def test_an_index_finds_a_missing_or_foreign_image_when_it_is_used(jsonl):
    (jsonl.parent / "2.png").unlink()
    index = IndexedRows(jsonl, root=None, needs=Needs(), one_shape=True)
    assert index[1].captions == {"caption": CAPTIONS[1]}
    with pytest.raises(DataError, match=r"train.jsonl:5: '2.png': expected an image file"):
        index[2]
    jsonl.write_text(json.dumps({"image_path": "../x.png", "caption": "a"}))
    (jsonl.parent.parent / "x.png").write_bytes((jsonl.parent / "1.png").read_bytes())
    index = IndexedRows(jsonl, root=None, needs=Needs(), one_shape=True)
    with pytest.raises(DataError, match="expected an image under the data root"):
        index[0]


def test_a_written_size_spares_opening_the_file(jsonl):
    record = {"image_path": "0.png", "caption": "a"}
    jsonl.write_text("\n".join(
        json.dumps(record | size) for size in ({"w*h": "640*480"}, {"width": 6, "height": 9}, {})
    ))
    index = IndexedRows(jsonl, root=None, needs=Needs(), one_shape=False)
    assert [size for size, _ in index.shapes()] == [(640, 480), (6, 9), SIZES[0]]


def test_the_head_of_a_turned_photograph_tells_its_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_size(tmp_path / "a.jpg") == (20, 30)


def test_identities_follow_what_rows_say(stored, jsonl, parquet):
    assert open_records(stored).identity() == open_records(stored).identity()
    before = open_records(jsonl).identity()
    jsonl.write_text(jsonl.read_text().replace("a cat", "a cow"))
    assert open_records(jsonl).identity() != before
    before = open_records(parquet).identity()
    (parquet / "train-00001-of-00002.parquet").unlink()
    assert open_records(parquet).identity() != before


@pytest.mark.parametrize("missing,data", [
    ("pyarrow", "parquet"), ("tensorflow_datasets", "array_records"),
])
def test_what_must_be_installed_is_said(missing, data, request):
    data = request.getfixturevalue(data)
    script = f"""
        import sys
        sys.modules[{missing!r}] = None
        from dopsd_jax.data.rows import read_rows
        try:
            read_rows({str(data)!r})
        except ValueError as e:
            print(e)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True,
                          text=True, check=True)
    assert "pip install -e '.[data]'" in done.stdout, done.stdout


def test_array_records_are_read_without_tensorflow(array_records):
    script = f"""
        import sys
        from dopsd_jax.data.rows import read_rows
        print(len(read_rows({str(array_records)!r})))
        print({{"torch", "tensorflow"}} & sys.modules.keys())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == ["5", "set()"]
