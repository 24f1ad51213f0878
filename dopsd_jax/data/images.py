"""Files -> pixels of exactly a bucket's size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dopsd_jax.data.rows import IMAGE_MODES_16, open_image


def read_image(path: str | Path) -> Image.Image:
    """Reads an image file as upright 8-bit RGB, transparency over white.

    Raises:
        DataError: The file is no readable image.

    Source: D-OPSD, z-image-turbo_self-distill-vlm/dataset.py (`to_rgb_safely`).
        Differs from reference: turned upright by EXIF; 16-bit images are scaled to 8 bits, not
        clipped at 255; a transparent colour counts in every mode, not in palettes alone.
    """
    image = open_image(path)
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


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Image in [-1, 1] -> uint8 pixels, rounded; values outside are clipped."""
    return np.clip(np.round((np.asarray(x, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)
