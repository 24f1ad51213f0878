"""Files -> pixels of exactly a bucket's size."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from dopsd_jax.data.files import IMAGE_MODES, IMAGE_MODES_16, ImageSource, open_image


def read_image(path: str | ImageSource) -> Image.Image:
    """Reads an image file as upright 8-bit RGB, transparency over white.

    Raises:
        DataError: The file is no readable image.

    Source: D-OPSD, z-image-turbo_self-distill-vlm/dataset.py (`to_rgb_safely`).
        Differs from reference: turned upright by EXIF; 16-bit images are scaled to 8 bits, not
        clipped at 255; a transparent colour counts in every mode, not in palettes alone.
    """
    return to_rgb(open_image(path))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, transparency over white."""
    if image.mode in IMAGE_MODES_16:
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def fit_image(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Resizes an RGB image to cover width x height, bicubic, and crops its centre.

    Returns:
        float32 [height, width, 3] in [-1, 1].

    Source: D-OPSD, z-image-turbo_self-distill-vlm/dataset.py (`process_image`).
    """
    w, h = image.size
    # Differs from reference: int() of a float scale can fall one pixel short of the bucket, and
    # the crop then pads black (314x410 into 896 wide). Whole numbers and ceil cannot.
    if width * h >= height * w:
        resized = (width, -(-h * width // w))
    else:
        resized = (-(-w * height // h), height)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    image = image.resize(resized, Image.Resampling.BICUBIC)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels.astype(np.float32) / 127.5 - 1.0


REFERENCE_AREA = 1024 * 1024  # pixels; larger references are made smaller
REFERENCE_MIN_SIDE = 64
REFERENCE_MAX_ASPECT = 8


def _floor(side: int, multiple: int) -> int:
    return side // multiple * multiple


def _within_area(width: int, height: int) -> tuple[int, int]:
    if min(width, height) < REFERENCE_MIN_SIDE:
        raise ValueError(
            f"reference image: expected sides of at least {REFERENCE_MIN_SIDE} pixels, got "
            f"{width}x{height} (width x height)"
        )
    if max(width, height) > REFERENCE_MAX_ASPECT * min(width, height):
        raise ValueError(
            f"reference image: expected an aspect ratio of at most {REFERENCE_MAX_ASPECT}, got "
            f"{width}x{height} (width x height); crop it"
        )
    if width * height <= REFERENCE_AREA:
        return width, height
    scale = math.sqrt(REFERENCE_AREA / (width * height))
    return int(width * scale), int(height * scale)


def reference_image(image: Image.Image | np.ndarray, multiple: int) -> np.ndarray:
    """A reference image as the VAE reads it: made smaller if it is large, then cropped.

    Args:
        image: PIL image of 8 or 16 bits per channel, or uint8 [H, W, 3]; taken as it is, not turned
            by EXIF as `read_image` does.
        multiple: Sides become multiples of it by a centred crop.

    Returns:
        float32 [H, W, 3] in [-1, 1].

    Raises:
        ValueError: No such image, a truncated one, a side below 64 pixels or an aspect ratio above
            8.

    Source: diffusers `Flux2KleinPipeline.__call__` and `Flux2ImageProcessor`.
        Differs from reference: transparency over white, and before the resize.
    """
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(
                "reference image: expected a PIL image or uint8 [H, W, 3], got "
                f"{type(image).__name__} {array.dtype} {array.shape}"
            )
        image = Image.fromarray(array)
    if image.mode not in IMAGE_MODES + IMAGE_MODES_16:
        raise ValueError(
            f"reference image: expected 8 or 16 bits per channel, got PIL mode {image.mode!r}; "
            "convert it to RGB"
        )
    try:
        image.load()
    except (OSError, SyntaxError) as error:  # PIL's decoders raise both on damaged bytes
        raise ValueError(f"reference image: expected a whole image, got {error}") from error
    image = to_rgb(image)
    resized = _within_area(*image.size)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.LANCZOS)
    width, height = (_floor(side, multiple) for side in resized)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels.astype(np.float32) / 127.5 - 1.0


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Image in [-1, 1] -> uint8 pixels, rounded; values outside are clipped."""
    return np.clip(np.round((np.asarray(x, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)
