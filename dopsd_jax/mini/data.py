"""The mini world's arrays, as dopsd_jax.mini.build writes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the world; arrays are memory-mapped.

    Attributes:
        pixels: uint8 [N, 64, 64, 3].
        captions: N captions.
        styles: int32 [N], index into labels.WORLD.
        concepts: bool [N, 48], shown or not.
        counts: int32 [N], number of objects.
        middles: float32 [N, 2], (x, y) of the first object in pixels.
        placements: float16 [N, 8, 8, 7], see world.placement; of scenes and pairs only.
        references: uint8 [N, 64, 64, 3], of pairs only.
    """

    pixels: np.ndarray
    captions: list[str]
    styles: np.ndarray
    concepts: np.ndarray
    counts: np.ndarray
    middles: np.ndarray
    placements: np.ndarray | None = None
    references: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.captions)


def read_part(world: str | Path, kind: str) -> Part:
    """A part of the world.

    Raises:
        ValueError: It is not there; says which command makes it.
    """
    directory = Path(world) / kind
    if not (directory / "captions.json").is_file():
        raise ValueError(
            f"{directory}: expected pixels.npy and captions.json, found no complete part; make it "
            f"with python -m dopsd_jax.mini.build --out {world}"
        )
    captions = json.loads((directory / "captions.json").read_text())
    arrays = {
        name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("pixels", "styles", "concepts", "counts", "middles", "placements",
                     "references")
        if (directory / f"{name}.npy").is_file()
    }
    return Part(captions=captions, **arrays)


def fingerprint(world: str | Path) -> str:
    """Identifies the world by its captions and the first picture of every part."""
    digest = hashlib.sha256()
    for kind in ("scenes", "pairs"):
        part = read_part(world, kind)
        digest.update("\n".join(part.captions).encode() + np.asarray(part.pixels[0]).tobytes())
    return digest.hexdigest()[:16]


def to_float(pixels: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """uint8 -> float32 in [-1, 1]; of NumPy or on the device."""
    return pixels.astype(np.float32) / 127.5 - 1
