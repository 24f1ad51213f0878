"""Images: colour and transparency, orientation, and an exact fit into the bucket."""

import re

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from dopsd_jax.data.buckets import PUBLISHED
from dopsd_jax.data.files import DataError
from dopsd_jax.data.images import fit_image, read_image, to_uint8


def read_pixels(image, path, **options):
    image.save(path, **options)
    read = read_image(path)
    assert read.mode == "RGB"
    return np.asarray(read)


def test_photograph_is_read_unchanged(tmp_path):
    cat = photographs.chelsea()
    np.testing.assert_array_equal(read_pixels(Image.fromarray(cat), tmp_path / "a.png"), cat)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_is_composited_over_white(tmp_path, mode):
    options = {}
    if mode in ("RGB", "L"):  # one colour is declared transparent
        image = Image.new(mode, (8, 4))
        gray = (127, 127, 127) if mode == "RGB" else 127
        image.paste(gray, (0, 0, 4, 4))
        options["transparency"] = gray
    else:
        image = Image.new("RGBA", (8, 4), (0, 0, 0, 255))
        image.paste((0, 0, 0, 0), (0, 0, 4, 4))
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    pixels = read_pixels(image, tmp_path / "a.png", **options)
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 0).all()


def test_half_transparent_red_becomes_pink(tmp_path):
    pixels = read_pixels(Image.new("RGBA", (2, 2), (255, 0, 0, 51)), tmp_path / "a.png")
    assert pixels[0, 0].tolist() == [255, 204, 204]


def test_gray_photograph_fills_three_channels(tmp_path):
    camera = photographs.camera()
    pixels = read_pixels(Image.fromarray(camera), tmp_path / "a.png")
    np.testing.assert_array_equal(pixels, np.repeat(camera[..., None], 3, -1))


@pytest.mark.parametrize("file", ["a.png", "a.tif"])
@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_image_is_scaled_not_clipped(tmp_path, file, dtype):
    values = np.array([[0, 128, 129, 257, 40_000, 65_535]], dtype)
    pixels = read_pixels(Image.fromarray(values), tmp_path / file)
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 156, 255]


def test_one_bit_and_cmyk_images_are_read(tmp_path):
    assert read_pixels(Image.new("1", (2, 2), 1), tmp_path / "a.png").min() == 255
    assert read_pixels(Image.new("CMYK", (8, 8)), tmp_path / "a.tif").min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file", ["a.png", "a.tif"])
def test_image_is_turned_upright(tmp_path, orientation, file):
    upright = Image.fromarray(photographs.chelsea()).resize((12, 8))
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(turn) if turn is not None else upright
    pixels = read_pixels(stored, tmp_path / file, exif=exif)
    np.testing.assert_array_equal(pixels, np.asarray(upright))


@pytest.mark.parametrize("file", ["a.png", "a.tif", "a.webp", "a.avif"])
def test_first_of_several_frames_is_read(tmp_path, file):
    first, second = Image.new("RGB", (32, 32), "black"), Image.new("RGB", (32, 32), "white")
    pixels = read_pixels(first, tmp_path / file, save_all=True, append_images=[second])
    assert pixels.max() < 8


def test_unreadable_image_is_refused_with_its_path(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'a.png'}: expected a whole AVIF")):
        read_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="b.png: expected an image file, got no such file"):
        read_image(tmp_path / "b.png")


def test_fit_has_no_black_edge_where_a_truncated_size_had_one():
    # int(314 * (896 / 314)) is 895: the published crop pads a black column.
    assert int(314 * (896 / 314)) == 895
    fitted = fit_image(Image.new("RGB", (314, 410), "white"), 896, 1152)
    assert fitted.shape == (1152, 896, 3)
    assert fitted.min() == 1.0


def test_fit_never_pads_any_size_into_any_bucket():
    draw = np.random.default_rng(0)
    for bucket in PUBLISHED:
        for w, h in draw.integers(1, 600, (8, 2)):
            fitted = fit_image(Image.new("RGB", (int(w), int(h)), "white"), *_quarter(bucket))
            assert fitted.shape == (*reversed(_quarter(bucket)), 3)
            assert fitted.min() == 1.0, (w, h, bucket)


def _quarter(bucket):
    return bucket.width // 4, bucket.height // 4


def test_fit_equals_the_published_transform_where_its_sizes_are_exact():
    cat = Image.fromarray(photographs.chelsea()).crop((0, 0, 400, 300))
    resized = cat.resize((200, 150), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((36, 0, 164, 150)), np.float32) / 255
    np.testing.assert_allclose(fit_image(cat, 128, 150), (expected - 0.5) / 0.5, atol=2e-7)


def test_fit_rounds_the_longer_side_up():
    cat = Image.fromarray(photographs.chelsea())  # 451 x 300, and 451 * 320 / 300 = 481.07
    resized = np.asarray(cat.resize((482, 320), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(to_uint8(fit_image(cat, 256, 320)), resized[:, 113:369])
    cat = cat.transpose(Image.Transpose.ROTATE_90)
    resized = np.asarray(cat.resize((320, 482), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(to_uint8(fit_image(cat, 320, 256)), resized[113:369])


def test_fit_crops_the_centre():
    stripes = np.zeros((4, 12, 3), np.uint8)
    stripes[:, 4:8] = 255
    assert fit_image(Image.fromarray(stripes), 4, 4).min() == 1.0
    assert fit_image(Image.fromarray(stripes.transpose(1, 0, 2)), 4, 4).min() == 1.0


def test_fit_is_float32_in_minus_one_to_one():
    fitted = fit_image(Image.fromarray(photographs.chelsea()), 64, 48)
    assert fitted.dtype == np.float32 and fitted.shape == (48, 64, 3)
    assert -1 <= fitted.min() < fitted.max() <= 1


def test_uint8_is_the_inverse_of_fit():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    levels = np.repeat(levels[..., None], 3, -1)
    np.testing.assert_array_equal(to_uint8(fit_image(Image.fromarray(levels), 16, 16)), levels)


def test_uint8_rounds_and_clips():
    x = np.array([-3.0, -1.0, -0.9962, 0.0039, 1.0, 7.0], np.float32)
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 255, 255]
    assert to_uint8(np.float32(0.9985)) == 255
