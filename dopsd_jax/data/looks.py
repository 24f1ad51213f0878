"""What can be seen in one picture as a run crops it, and what may be wrong with it."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.crops import MAX_CUT, cut_away, enlarged
from dopsd_jax.data.files import ImageSource, open_image
from dopsd_jax.data.images import fit_image, to_rgb, to_uint8

THUMBNAIL = 256   # pixels of the longer side; smaller crops are shown as they are
LOSSLESS = 128    # up to which a thumbnail is a PNG: there JPEG would be seen
SMALL = 16        # side of the few colours that tell pictures of one shape apart
BLANK = 2.0       # standard deviation in levels of 255, below which nothing is on a picture
# Measured on fifteen photographs and eight drawings (scikit-image's and the mini model's), the
# ratio of `sharpness` is 0.38 or more where they are sharp, about 0.2 after a Gaussian blur of one
# pixel and, at 256 pixels a side, 0.09 to 0.15 after two.
BLURRED = 0.16
BLURRED_BESIDE = 0.4  # of the set's median
# Of 64 bits. The same pictures: different ones are at least 16 apart, saved as JPEG of quality 30,
# at half the size, brighter by a fifth or with more contrast at most 6.
NEAR_BITS = 6
NEAR_COLOURS = 30.0   # levels of 255; drawings of one form in other colours have the same bits


@dataclass(frozen=True)
class Look:
    """One image of a row, cut to the row's bucket.

    Attributes:
        size: (width, height) of the file, upright.
        enlarged, cut: See data/crops.py.
        transparent: Share of its pixels that are not opaque, which become white or mixed with it.
        blank: Whether all of the crop has one colour.
        sharpness: See `sharpness`; None where there is nothing to judge it by.
        bits: uint8 [8], a perceptual hash of the crop.
        colours: float32 [SMALL, SMALL, 3], the crop made small.
        thumbnail: The crop as a PNG or JPEG file.
        whole: The whole picture with the crop's frame as a JPEG file, where much is cut away.
    """

    size: tuple[int, int]
    enlarged: float
    cut: float
    transparent: float
    blank: bool
    sharpness: float | None
    bits: np.ndarray
    colours: np.ndarray
    thumbnail: bytes
    whole: bytes | None


def look_at(source: ImageSource, bucket: Bucket) -> Look:
    """Opens an image, and cuts it as `Data.pixels` does.

    Raises:
        DataError: The file is no readable image.
    """
    # Here, because training does not need it.
    import imagehash

    image = open_image(source)
    transparent = _transparent(image)
    image = to_rgb(image)
    crop = Image.fromarray(to_uint8(fit_image(image, bucket.width, bucket.height)))
    small = crop.resize((SMALL, SMALL), Image.Resampling.BOX)
    cut = float(cut_away(image.size, bucket))
    return Look(
        image.size, float(enlarged(image.size, bucket)), cut, transparent,
        bool(np.asarray(crop, np.float32).std(axis=(0, 1)).max() < BLANK), sharpness(crop),
        np.packbits(imagehash.phash(crop).hash.ravel()), np.asarray(small, np.float32),
        thumbnail(crop), _framed(image, bucket) if cut > MAX_CUT else None,
    )


def _transparent(image: Image.Image) -> float:
    if not image.has_transparency_data:
        return 0.0
    counts = image.convert("RGBA").getchannel("A").histogram()
    return 1 - counts[255] / sum(counts)


def _laplacian(grey: Image.Image) -> float:
    """Nearly the largest of a picture's second differences, in levels of 255."""
    x = np.asarray(grey, np.float32)
    middle = 4 * x[1:-1, 1:-1]
    found = np.abs(middle - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:])
    return float(np.percentile(found, 99.5))


def sharpness(picture: Image.Image) -> float | None:
    """How sharp the sharpest edges of a picture are: the Laplacian beside that at a quarter size.

    Contrast and the amount of detail are in both, so a plain picture is not taken for a blurred one
    and a subject before a soft ground counts as sharp.

    Args:
        picture: RGB.

    Returns:
        About 1 where edges are as sharp as pixels allow, 0.1 where they are several pixels wide;
        None for a picture that is too small or has no edges.
    """
    grey = picture.convert("L")
    if min(grey.size) < 32:
        return None
    coarse = _laplacian(grey.reduce(4))
    return _laplacian(grey) / coarse if coarse > 8 else None


def thumbnail(crop: Image.Image) -> bytes:
    """A crop as an image file: exactly as it is where it is small."""
    small, out = crop.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    if max(crop.size) <= LOSSLESS:
        small.save(out, "PNG")
    else:
        small.save(out, "JPEG", quality=85)
    return out.getvalue()


def _framed(image: Image.Image, bucket: Bucket) -> bytes:
    """The whole picture, what is cut away made pale, as a JPEG file."""
    scale = float(enlarged(image.size, bucket))
    kept = np.array([bucket.width, bucket.height]) / scale / np.array(image.size)
    small, out = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    left, top = (1 - kept) / 2 * small.size
    box = (int(left), int(top), math.ceil(small.width - left), math.ceil(small.height - top))
    pale = Image.blend(small, Image.new("RGB", small.size, "white"), 0.65)
    pale.paste(small.crop(box), box[:2])
    ImageDraw.Draw(pale).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline="#d03000")
    pale.save(out, "JPEG", quality=80)
    return out.getvalue()


def blurred(sharpnesses: list[float | None]) -> list[int]:
    """Which pictures of a set are much less sharp than the others, the least sharp first.

    A set that is soft throughout is taken to be meant so.
    """
    known = [s for s in sharpnesses if s is not None]
    if not known:
        return []
    limit = min(BLURRED, BLURRED_BESIDE * float(np.median(known)))
    found = [i for i, s in enumerate(sharpnesses) if s is not None and s < limit]
    return sorted(found, key=lambda i: sharpnesses[i])


def twins(looks: list[Look]) -> list[list[int]]:
    """Groups of pictures that are nearly the same, the largest group first."""
    bits = np.array([look.bits for look in looks], np.uint8).view(np.uint64).ravel()
    colours = np.array([look.colours for look in looks])
    group = list(range(len(looks)))

    def first(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i in range(len(looks) - 1):
        near = np.flatnonzero(np.bitwise_count(bits[i + 1 :] ^ bits[i]) <= NEAR_BITS) + i + 1
        for j in near:
            if np.abs(colours[i] - colours[j]).mean() <= NEAR_COLOURS:
                a, b = sorted((first(i), first(int(j))))
                group[b] = a
    groups: dict[int, list[int]] = {}
    for i in range(len(looks)):
        groups.setdefault(first(i), []).append(i)
    return sorted((g for g in groups.values() if len(g) > 1), key=len, reverse=True)
