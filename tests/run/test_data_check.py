"""A run's data before the run: every warning, what is refused, and the page that shows it."""

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage import data as photographs

from configs import tiny as tiny_config
from dopsd_jax import encode, train
from dopsd_jax.data import crops
from dopsd_jax.data.datasets import read_data
from dopsd_jax.data.files import DataError
from dopsd_jax.data.images import to_uint8
from dopsd_jax.run import data_check, data_page
from dopsd_jax.run.config import needs_of_rows
from tests import commands
from tests.test_report import Reader

ROOT = Path(__file__).parents[2]
LONG = "a long caption " * 12


def photo(name, size=None):
    image = Image.fromarray(getattr(photographs, name)()).convert("RGB")
    return image.resize(size) if size else image


def see_through(opaque):
    image = photo("coins", (80, 64)).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.paste((0, 0, 0, 0), (0, 0, 40, 64)) if not opaque else None
    return image


# Name -> picture, caption, and what is said of the row; "" of those that nothing is wrong with.
PICTURES = {
    "astronaut.png": (photo("astronaut"), "an astronaut", "nearly the same picture as #2"),
    "astronaut_again.jpg": (photo("astronaut", (300, 300)), "someone in orange",
                            "nearly the same picture as #1"),
    "blank.png": (Image.new("RGB", (70, 70), "red"), "red", "nothing but one colour"),
    "blurred.png": (photo("coffee").filter(ImageFilter.GaussianBlur(14)), "coffee",
                    "blurred beside the others"),
    "camera.png": (photo("camera"), "a man with a camera", ""),
    "long.png": (photo("moon"), LONG, "caption: 187 tokens, the student reads 128"),
    "not_so_tiny.png": (photo("rocket", (50, 50)), "a small rocket", ""),
    "opaque.png": (see_through(opaque=True), "coins", ""),
    "see_through.png": (see_through(opaque=False), "half of the coins",
                        "50% of the picture is transparent and becomes white"),
    "tiny.png": (photo("chelsea", (30, 30)), "a cat", "enlarged 2.1 times, from 30x30"),
    "wide.png": (photo("gravel").crop((0, 0, 512, 170)), "gravel",
                 "34% of the picture is cut away"),
    "wide_not_so_much.png": (photo("brick").crop((0, 0, 512, 185)), "bricks", ""),
    "wordless.png": (photo("hubble_deep_field"), "?!",
                     "caption: '?!' has neither letter nor digit"),
}


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """A config of the tiny models, of which nothing but the tokenizers is there, and PICTURES."""
    home = tmp_path_factory.mktemp("data_check")
    for given, name in ((tiny.pipeline, "model"), (tiny.vlm, "vlm")):
        shutil.copytree(given, home / name, ignore=shutil.ignore_patterns("*.safetensors"))
    (home / "photos").mkdir()
    for name, (picture, caption, _) in PICTURES.items():
        picture.save(home / "photos" / name)
        (home / "photos" / name).with_suffix(".txt").write_text(caption)
    c = tiny_config.get_config()
    c.model, c.vlm, c.data = (str(home / name) for name in ("model", "vlm", "photos"))
    c.buckets, c.text_tokens, c.teacher_tokens = "64x64,128x64", 128, 672
    c.truncate_prompts, c.lora.rank, c.batch_size = True, 4, 2
    c.mesh.fsdp = 64  # of another machine
    c.lock()
    return c


@pytest.fixture(scope="module")
def inspection(config):
    return data_check.inspect(config)


def copy(config, **changes):
    changed = config.copy_and_resolve_references()
    changed.update(changes)
    return changed


def photos(config, folder, *names, captions=()):
    """Some of the pictures in a folder of their own, with other captions where some are given."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        PICTURES[name][0].save(folder / name)
        text = captions[i] if captions else PICTURES[name][1]
        (folder / name).with_suffix(".txt").write_text(text)
    return copy(config, data=str(folder))


@pytest.mark.parametrize("name", PICTURES)
def test_each_warning_is_raised_where_it_should_be_and_nowhere_else(inspection, name):
    (row,) = [r for r in inspection.rows if r.row.where == name]
    assert row.warnings == [PICTURES[name][2]] * bool(PICTURES[name][2]) and row.problems == []


def test_warnings_come_by_kind_with_the_rows_they_concern(inspection):
    assert not inspection.refusals()
    assert {w.title: [n.row.row.where for n in w.rows] for w in inspection.warned} == {
        "One colour and nothing else": ["blank.png"],
        "Enlarged more than 2 times": ["tiny.png"],
        "More than 30% cut away": ["wide.png"],
        "Captions without a word": ["wordless.png"],
        "Captions whose end is not read": ["long.png"],
        "Transparent parts become white": ["see_through.png"],
        "Nearly the same picture": ["astronaut.png", "astronaut_again.jpg"],
        "Less sharp than the others": ["blurred.png"],
    }


def test_of_one_kind_the_worst_row_comes_first_and_each_row_once(config, tmp_path):
    small = photos(config, tmp_path / "a", "tiny.png", "camera.png")
    for size in (10, 20):
        PICTURES["tiny.png"][0].resize((size, size)).save(tmp_path / "a" / f"{size}.png")
        (tmp_path / "a" / f"{size}.txt").write_text("a cat")
    first, *_ = data_check.inspect(small).warned
    assert [n.row.row.where for n in first.rows] == ["10.png", "20.png", "tiny.png"]


def test_a_caption_that_all_rows_share_is_noted(config, tmp_path):
    def titles(captions):
        one = photos(config, tmp_path / "a", "camera.png", "long.png", captions=captions)
        return [w.title for w in data_check.inspect(one).warned]

    assert titles(("x", "x ")) == ["All rows have the same caption"]
    assert titles(("x", "y")) == []


def test_small_and_rare_buckets_are_noted(config, tmp_path, monkeypatch):
    few = photos(config, tmp_path / "a", "camera.png", "long.png", "opaque.png",
                 "wide_not_so_much.png")
    few.truncate_prompts, few.batch_size = True, 1
    assert [w.title for w in data_check.inspect(few).warned] == ["Captions whose end is not read"]
    few.batch_size = 2
    assert "Fewer rows than a batch of 2 takes: 128x64 (1 row)" in [
        w.title for w in data_check.inspect(few).warned]
    few.batch_size = 1
    monkeypatch.setattr(crops, "UNEQUAL", 2)
    assert "Few rows beside the largest bucket: 128x64 (1 row)" in [
        w.title for w in data_check.inspect(few).warned]


def test_all_that_a_run_refuses_is_told_and_the_rest_is_shown(config, tmp_path):
    bad = photos(config, tmp_path / "a", "camera.png", "long.png", "wide.png", "opaque.png")
    bad.truncate_prompts, bad.small_buckets = False, "error"
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "a" / "broken.txt").write_text("broken")
    PICTURES["camera.png"][0].save(tmp_path / "a" / "empty.png")
    (tmp_path / "a" / "empty.txt").write_text(" \n")
    found = data_check.inspect(bad)
    told = dict(found.refusals())
    assert list(told) == ["broken.png", "empty.png", "buckets", "long.png"]
    assert "expected a whole AVIF, BMP" in told["broken.png"]
    assert told["empty.png"] == "empty.txt: expected a caption, got an empty file; write one"
    assert "got 1 in 128x64; choose batch_size <= 1" in told["buckets"]
    assert told["long.png"].startswith("caption, text_tokens = 128: expected at most 128 tokens")
    assert [r.row.where for r in found.rows] == [
        "camera.png", "long.png", "opaque.png", "wide.png"]
    assert found.rows[1].warnings == []  # a caption that is refused is not one that is cut
    # And a run does refuse it.
    with pytest.raises(DataError, match="2 of 6 rows cannot be used"):
        read_data(bad, needs_of_rows(bad))


def test_data_without_a_usable_row_has_a_page_too(config, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    found = data_check.inspect(copy(config, data=str(tmp_path / "a")))
    assert found.data is None and {where for where, _ in found.refusals()} == {"x.png"}
    text = " ".join(Reader(data_page.page(config, found)).text)
    assert "expected a caption in x.txt beside it" in text
    assert data_page.sheet(found).size[0] > 0


@pytest.mark.parametrize("encode", ["ahead", "online"])
def test_rows_of_a_large_set_are_spread_evenly_and_bad_ones_left_out(config, tmp_path, encode):
    lines = [json.dumps({"image_path": "x.png", "caption": f"number {i}", "w*h": "64*64"})
             for i in range(20)]
    lines[3] = "no JSON"
    lines[17] = json.dumps({"image_path": "gone.png", "caption": "a", "w*h": "64*64"})
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    PICTURES["camera.png"][0].resize((64, 64)).save(tmp_path / "x.png")
    large = copy(config, data=str(tmp_path / "train.jsonl"), encode=encode)
    found = data_check.inspect(large, limit=4)
    # A picture that is gone is known to an index only when its row is read.
    usable = 18 if encode == "ahead" else 19
    assert len(found.data.rows) == usable
    assert [r.number for r in found.rows] == [0, 6, 11 if encode == "ahead" else 12, usable - 1]
    lost = ["train.jsonl:18"] if encode == "ahead" else []
    assert [where for where, _ in found.refusals()] == ["train.jsonl:4", *lost]
    text = " ".join(Reader(data_page.page(large, found)).text)
    assert f"4 of {usable} rows were looked at, evenly spread." in text
    found = data_check.inspect(large)
    assert len(found.rows) == 18 and len(found.refusals()) == 2
    assert "gone.png" in str(found.refusals())


def pictures_of(html):
    """Of every row's card the pixels of its pictures, by their words."""
    cards = re.findall(r'<article id="row(\d+)".*?</article>', html, re.S)
    found = {}
    for number, card in zip(cards, re.findall(r"<article.*?</article>", html, re.S), strict=True):
        sources = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', card)
        found[int(number) - 1] = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
            for kind, code in sources if kind == "png"
        ]
    return found


def test_the_page_shows_the_very_pixels_that_a_run_learns_from(config, inspection):
    data = read_data(config, needs_of_rows(config))
    shown = pictures_of(data_page.page(config, inspection))
    assert list(shown) == list(range(len(PICTURES)))
    for row, (pixels,) in shown.items():
        np.testing.assert_array_equal(pixels, to_uint8(data.pixels(row)))


def test_references_are_shown_beside_the_target_and_judged_too(tiny_flux2, config, tmp_path):
    for name in ("astronaut.png", "wide.png", "camera.png"):
        PICTURES[name][0].save(tmp_path / name)
    rows = [["camera.png", "astronaut.png"], ["wide.png", "camera.png", "astronaut.png"]]
    (tmp_path / "edits.jsonl").write_text("\n".join(
        json.dumps({"image_paths": paths, "caption": "change it"}) for paths in rows))
    edits = copy(config, model=str(tiny_flux2), recipe="edit_ref", teacher_tokens=512,
                 text_tokens=512, data=str(tmp_path / "edits.jsonl"), vlm="")
    found = data_check.inspect(edits)
    assert found.rows[0].tokens["caption"]["teacher"] > found.rows[0].tokens["caption"]["student"]
    assert "reference 1: 67% of the picture is cut away" in found.rows[1].warnings
    data, html = read_data(edits, needs_of_rows(edits)), data_page.page(edits, found)
    for row, shown in pictures_of(html).items():
        assert len(shown) == len(rows[row])
        for image, pixels in enumerate(shown):
            np.testing.assert_array_equal(pixels, to_uint8(data.pixels(row, image)))
    assert {"reference 1", "reference 2", "target"} <= {*Reader(html).text}


def test_several_sets_weights_and_repeats_are_told(config, tmp_path):
    first = photos(config, tmp_path / "a", "camera.png")
    photos(config, tmp_path / "a" / "3_more", "opaque.png")
    photos(config, tmp_path / "b", "long.png")
    both = copy(first, data=f"{tmp_path / 'a'},{tmp_path / 'b'}", data_weights="3,1")
    text = " ".join(Reader(data_page.page(both, data_check.inspect(both))).text)
    for words in (f"2 of {tmp_path / 'a'}, 75% of the pictures seen", "counts 3 times",
                  "3, 5 in an epoch", f"#3 {tmp_path / 'b'}: long.png"):
        assert words in text, words


def test_rows_without_a_picture_are_shown_by_their_texts(config, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(
        {"caption": "my cat", "enhanced_prompt": "a tabby cat", "w*h": "128*64"}))
    texts = copy(config, recipe="text", data=str(tmp_path / "a.jsonl"), vlm="", batch_size=1)
    found = data_check.inspect(texts)
    assert not found.refusals() and not found.warned
    text = " ".join(Reader(data_page.page(texts, found)).text)
    assert "no picture" in text and "a tabby cat" in text and "128x64" in text
    assert np.asarray(data_page.sheet(found)).min() < 100  # its number


TEXTS = ("<script>alert(1)</script>", "\"quotes\" & 'quotes' &amp;", "قطة على السجادة", "🚀👩‍🚀 猫",
         "</article></p><img src=x onerror=alert(1)>")


def test_every_text_is_escaped(config, tmp_path):
    names = [f"{i}<b>&\".png" for i in range(len(TEXTS))]
    for i, name in enumerate(names):
        PICTURES["camera.png"][0].crop((i * 40, 0, 300, 300)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(TEXTS[i], "utf-8")
    (tmp_path / "<i>broken.txt").write_text("x")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("a name that is no UTF-8")
    odd = copy(config, data=str(tmp_path), truncate_prompts=True)
    html = data_page.page(odd, data_check.inspect(odd))
    read = Reader(html)
    assert {*TEXTS} <= {*read.text}
    assert {f"#{i + 1} {name}" for i, name in enumerate(names)} <= {*read.text}
    assert {"<i>broken.txt", "?.txt"} <= {*read.text}
    assert not {t for t, _ in read.tags} & {"script", "b", "i", "iframe"}
    assert not [k for _, a in read.tags for k in a if k.startswith("on")]
    links = [v for _, a in read.tags for k, v in a.items() if k in ("src", "href")]
    assert links and all(v.startswith(("data:", "#row")) for v in links)
    captions = [a for t, a in read.tags if a.get("class") == "caption"]
    assert len(captions) == len(TEXTS) and all(a["dir"] == "auto" for a in captions)


def test_the_sheet_frames_the_rows_that_something_is_said_of(inspection):
    sheet = np.asarray(data_page.sheet(inspection)).astype(int)
    framed = (sheet == [0xD0, 0x30, 0]).all(-1)
    across = min(max(round((len(PICTURES) * 1.4) ** 0.5), 4), len(PICTURES))
    for i, row in enumerate(inspection.rows):
        y, x = (data_page.GAP + n * (data_page.CELL + data_page.GAP + extra)
                for n, extra in ((i // across, data_page.LABEL), (i % across, 0)))
        assert framed[y, x : x + data_page.CELL].all() == bool(row.warnings), row.row.where


@pytest.mark.parametrize("start", ["train", "encode"])
def test_a_run_says_in_its_log_what_sizes_alone_tell(config, tmp_path, monkeypatch, start):
    lines = []
    monkeypatch.setattr(data_check.log, "warning", lambda words, *args: lines.append(words % args))
    run = photos(config, tmp_path / "a", "tiny.png", "camera.png", "wide.png",
                 captions=["x", "x", LONG])
    # It ends at the next check, before anything is written or loaded.
    run.truncate_prompts, run.mesh.fsdp, run.cache = False, 1, str(tmp_path / "cache")
    with pytest.raises(DataError, match="captions that do not fit"):
        train.train(run, tmp_path / "run") if start == "train" else encode.encode(run)
    assert lines == [
        "warning: 1 of 3 pictures are enlarged more than 2 times; the most is 2.1 times (tiny.png, "
        "30x30 in 64x64)",
        "warning: 1 of 3 pictures lose more than 30% to the crop; the most is 34% (wide.png, "
        "512x170 in 128x64)",
        "warning: rows come several times in one batch, which takes 2, from the buckets 128x64 (1 "
        "row)",
        "look at every row as it is cropped: python -m dopsd_jax.data with the same --config flags",
    ]
    lines.clear()
    run = photos(run, tmp_path / "b", "camera.png", "opaque.png", captions=["x", LONG])
    with pytest.raises(DataError, match="captions that do not fit"):
        train.train(run, tmp_path / "run") if start == "train" else encode.encode(run)
    assert lines == []


def command(config, *args):
    keys = ("model", "vlm", "data", "buckets", "text_tokens", "teacher_tokens", "truncate_prompts")
    given = [f"--config.{key}={config[key]}" for key in keys]
    return commands.run("dopsd_jax", "data", "--config=configs/tiny.py", *given, *args)


def test_the_command_writes_both_files_and_says_what_is_wrong(config, tmp_path):
    done = command(config, f"--out={tmp_path / 'out'}", "--config.mesh.fsdp=64", "--limit=12")
    assert done.returncode == 0, done.stderr
    assert "warning: Enlarged more than 2 times: 1 of 12 rows; tiny.png" in done.stdout
    assert (tmp_path / "out" / "data.html").read_text().startswith("<!doctype html>")
    assert Image.open(tmp_path / "out" / "data.png").size[0] > 100
    (tmp_path / "file").write_text("")
    done = command(config, f"--out={tmp_path / 'file'}")
    assert done.returncode == 1 and "expected a directory, found a file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("changes,message", [
    ({"data": "nowhere"}, "data: expected a JSONL, .* 'nowhere', which does not exist"),
    ({"data": "gs://x/y.jsonl"}, "data: expected files of this machine"),
    ({"recipe": "x", "batch_size": 0}, "config:\n  .*recipe: expected one of(.|\n)*batch_size: "),
    ({"model": "nowhere"}, "model: nowhere: expected a directory with model_index.json"),
])
def test_what_cannot_be_read_at_all_is_refused_as_a_run_refuses_it(config, changes, message):
    with pytest.raises(ValueError, match=message):
        data_check.inspect(copy(config, **changes))
