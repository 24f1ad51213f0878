"""What sizes and pixels say of a picture: each warning's rule, on a picture that it is for and on
one that it is not."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from skimage import data as photographs

from dopsd_jax.data import crops, looks
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.datasets import Data, read_data
from dopsd_jax.data.drafts import Needs
from dopsd_jax.data.images import fit_image
from dopsd_jax.run import keys

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "camera", "hubble_deep_field", "moon", "page",
         "brick", "gravel", "coins")


def photo(name):
    return Image.fromarray(getattr(photographs, name)()).convert("RGB")


def look(image, bucket, path):
    image.save(path)
    return looks.look_at(path, bucket)


@pytest.mark.parametrize("size", [(1, 1), (100, 100), (64, 48), (1000, 10), (10, 1000), (301, 449)])
@pytest.mark.parametrize("bucket", [Bucket(64, 64), Bucket(96, 48), Bucket(48, 96)])
def test_enlargement_and_cut_are_those_of_the_crop(size, bucket):
    """By a picture whose pixels say where they stood."""
    width, height = size
    x, y = np.meshgrid(np.arange(width) / width * 255, np.arange(height) / height * 255)
    pixels = np.stack([x, y, x], -1).astype(np.uint8)
    crop = (fit_image(Image.fromarray(pixels), bucket.width, bucket.height) + 1) / 2
    shown = [min(np.ptp(crop[..., c]) + 1 / side, 1) for c, side in enumerate(size)]
    factor = crops.enlarged(size, bucket)
    assert factor == max(bucket.width / width, bucket.height / height)
    cut = crops.cut_away(size, bucket)
    assert cut == pytest.approx(1 - (bucket.width * bucket.height) / (width * height * factor**2))
    if min(size) > 40:  # pixels of a small one are mixed with their neighbours
        assert 1 - cut == pytest.approx(shown[0] * shown[1], abs=0.05)


def test_numbers_are_said_plainly():
    assert [crops.times(f) for f in (0.5, 1.0, 2.25, 64.0, 6400.0)] == [
        "to 50%", "1.0 times", "2.2 times", "64 times", "6400 times"]
    assert [crops.share(p) for p in (0.0, 0.004, 0.3, 0.996, 1.0)] == [
        "0%", "less than 1%", "30%", "more than 99%", "100%"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [64, 128, 256])
def test_sharp_photographs_are_told_from_the_same_ones_blurred(name, side):
    image = photo(name)
    scale = side / min(image.size)
    if scale > 1.3:
        pytest.skip("enlarged, which blurs too")
    sharp = image.resize([round(s * scale) for s in image.size], Image.Resampling.BICUBIC)
    assert looks.sharpness(sharp) > 1.8 * looks.BLURRED
    if side == 256:  # of a small one with fine texture blur leaves too little to judge
        assert looks.sharpness(sharp.filter(ImageFilter.GaussianBlur(2))) < looks.BLURRED


def test_low_contrast_and_a_soft_ground_are_no_blur():
    image = photo("astronaut")
    pale = ImageEnhance.Contrast(image).enhance(0.3)
    ground = image.filter(ImageFilter.GaussianBlur(6))
    ground.paste(image.crop((150, 50, 330, 250)), (150, 50))
    for picture in (pale, ground):
        assert looks.sharpness(picture) > 1.8 * looks.BLURRED
    for picture in (Image.new("RGB", (64, 64), "red"), image.resize((20, 20))):
        assert looks.sharpness(picture) is None


def test_blur_is_judged_beside_the_set():
    assert looks.blurred([0.9, 0.8, None, 0.12, 0.7, 0.1]) == [5, 3]
    assert looks.blurred([0.12, 0.11, 0.13]) == []  # a set that is soft throughout
    assert looks.blurred([0.5, 0.9, 0.2]) == [] and looks.blurred([None]) == []


def saved(image, **how):
    image.save(out := io.BytesIO(), **how)
    return Image.open(out)


def test_the_same_picture_is_found_again_and_others_are_not(tmp_path):
    pictures = [photo(name) for name in NAMES]
    same = photo("astronaut")
    pictures += [
        saved(same, format="JPEG", quality=30), same.resize((200, 200)),
        ImageEnhance.Brightness(same).enhance(1.2),
    ]
    found = [look(p, Bucket(256, 256), tmp_path / "a.png") for p in pictures]
    assert looks.twins(found) == [[0, 11, 12, 13]]


def test_a_form_in_another_colour_is_another_picture(tmp_path):
    found = []
    for colour in ("red", "blue", "red"):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(colour, (16, 16, 48, 48))
        found.append(look(image, Bucket(64, 64), tmp_path / "a.png"))
    assert looks.twins(found) == [[0, 2]] and looks.twins([]) == []


def test_transparency_counts_where_there_is_some(tmp_path):
    image = photo("chelsea").resize((64, 64)).convert("RGBA")
    assert look(image, Bucket(64, 64), tmp_path / "a.png").transparent == 0
    image.putalpha(Image.linear_gradient("L").resize((64, 64)).point(lambda x: 255 * (x > 63)))
    assert look(image, Bucket(64, 64), tmp_path / "a.png").transparent == pytest.approx(0.25, 0.05)


def test_a_picture_of_one_colour_is_blank_and_a_pale_one_is_not(tmp_path):
    assert look(Image.new("RGB", (80, 64), "beige"), Bucket(64, 64), tmp_path / "a.png").blank
    pale = Image.new("RGB", (80, 64), "beige")
    pale.paste("white", (30, 30, 50, 50))
    assert not look(pale, Bucket(64, 64), tmp_path / "a.png").blank


@pytest.mark.parametrize("size", [(600, 3), (3, 600), (199, 1), (1, 200)])
def test_the_frame_around_a_sliver_can_be_drawn(tmp_path, size):
    seen = look(photo("moon").resize(size), Bucket(64, 64), tmp_path / "a.png")
    assert seen.whole and seen.cut > 0.98
    assert look(photo("moon").resize((253, 2)), Bucket(16, 1344), tmp_path / "a.png").whole
    seen = look(photo("moon").resize((64, 60)), Bucket(64, 64), tmp_path / "a.png")
    assert seen.whole is None


def test_large_crops_become_jpeg_and_small_ones_stay_as_they_are():
    large, small = photo("astronaut"), photo("astronaut").resize((128, 64))
    with Image.open(io.BytesIO(looks.thumbnail(large))) as opened:
        assert opened.format == "JPEG" and opened.size == (256, 256)
    with Image.open(io.BytesIO(looks.thumbnail(small))) as opened:
        assert opened.format == "PNG"
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(small))


def buckets_of(*counts):
    """Data of that many rows in each of several buckets."""
    ends = np.cumsum([0, *counts])
    return SimpleNamespace(assignment={
        Bucket(64, 16 * (i + 1)): range(ends[i], ends[i + 1]) for i in range(len(counts))})


def test_small_and_rare_buckets_are_named():
    assert crops.small_buckets(buckets_of(4, 3, 1), 4) == ["64x32 (3 rows)", "64x48 (1 row)"]
    assert crops.small_buckets(buckets_of(4, 3, 1), 1) == []
    assert crops.rare_buckets(buckets_of(100, 4, 5)) == ["64x32 (4 rows)"]
    assert crops.rare_buckets(buckets_of(4)) == []


@pytest.fixture
def shapes(tmp_path):
    """A JSONL of pictures of several sizes, and a config that reads it."""
    lines = []
    for i, size in enumerate([(64, 64), (31, 31), (1, 1), (96, 64), (500, 5), (64, 80)]):
        photo("moon").resize(size).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image_path": f"{i}.png", "caption": "a"}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    config = keys.base()
    config.data, config.buckets = str(tmp_path / "train.jsonl"), "64x64,128x64"
    config.batch_size = 1
    return config


@pytest.mark.parametrize("encode", ["ahead", "online"])
def test_sizes_alone_tell_the_worst_row(shapes, encode):
    shapes.encode = encode
    data = read_data(shapes, Needs())
    assert data.sizes().tolist() == [[64, 64], [31, 31], [1, 1], [96, 64], [500, 5], [64, 80]]
    assert crops.worst_shapes(data) == [
        "3 of 6 pictures are enlarged more than 2 times; the most is 64 times (train.jsonl:3, 1x1 "
        "in 64x64)",
        "1 of 6 pictures lose more than 30% to the crop; the most is 98% (train.jsonl:5, 500x5 in "
        "128x64)",
    ]


def test_nothing_is_said_of_good_sizes_or_of_none(shapes):
    shapes.encode, shapes.buckets = "online", "64x64"
    data = read_data(shapes, Needs())  # one bucket: no size is looked at
    assert not data.sizes().any() and crops.worst_shapes(data) == []
    shapes.data = shapes.data.replace("train.jsonl", "good.jsonl")
    with open(shapes.data, "w") as file:
        file.write(json.dumps({"image_path": "0.png", "caption": "a"}))
    shapes.encode = "ahead"
    assert crops.worst_shapes(read_data(shapes, Needs())) == []
    with open(shapes.data, "w") as file:  # a size without a picture
        file.write(json.dumps({"w*h": "1*1", "caption": "a", "enhanced_prompt": "b"}))
    for shapes.encode in ("ahead", "online"):
        data = read_data(shapes, Needs(images=(0, 1), enhanced=True))
        assert isinstance(data, Data) and crops.worst_shapes(data) == []
