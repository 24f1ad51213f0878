"""What a run does to its model, measured on pictures by cheap numbers, without a network.

All take uint8 [N, H, W, 3] and return float32 [N], one number per picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core.files import write_atomic

SCALES = (4, 8, 16)  # pixels per side of what `distance` compares
MIN_SHARPNESS = 0.8  # of the untuned model's, below which a checkpoint is not the best one
BEST = "best.json"
MOVED = "preview_"  # before the names of gauges and pictures on preview_model


@jax.jit
def _sharpness(pixels):
    grey = pixels.astype(jnp.float32).mean(-1)
    middle = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return jnp.abs(4 * middle - around).mean((1, 2))


def sharpness(pixels: np.ndarray) -> np.ndarray:
    """Mean absolute Laplacian of the grey picture, in levels of 255. Falls first where few-step
    ability is lost."""
    return np.asarray(_sharpness(pixels))


def _boxes(pixels: np.ndarray, side: int) -> np.ndarray:
    """Means of squares of `side` pixels, float32 [N, H / side, W / side, 3]; the rest is cut."""
    N, H, W, C = pixels.shape
    h, w = H // side, W // side
    cut = pixels[:, : h * side, : w * side].astype(np.float32)
    return cut.reshape(N, h, side, w, side, C).mean((2, 4))


def distance(pixels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean absolute difference of squares of 4, 8 and 16 pixels, in levels of 255."""
    return np.mean([
        np.abs(_boxes(pixels, s) - _boxes(others, s)).mean((1, 2, 3)) for s in SCALES
    ], axis=0)


def style_distance(pixels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Difference of style wherever things are: of the sorted values of every colour channel (the
    Wasserstein distance of their histograms), in levels of 255."""
    def ranked(x):
        return np.sort(x.reshape(len(x), -1, 3).astype(np.float32), axis=1)

    return np.abs(ranked(pixels) - ranked(others)).mean((1, 2))


def retention(ours: np.ndarray, untuned: np.ndarray) -> dict[str, float]:
    """How far pictures of unrelated prompts have moved from the untuned model's, on its noise.

    Returns:
        drift: `distance` to them, in levels of 255.
        sharpness_ratio: Of means; 1 is as sharp as before.
    """
    return {
        "drift": float(distance(ours, untuned).mean()),
        "sharpness_ratio": float(sharpness(ours).mean() / max(sharpness(untuned).mean(), 1e-6)),
    }


def best_checkpoint(
    rows: Sequence[dict[str, Any]], saved: Sequence[int], *, moved: bool = False
) -> dict[str, Any] | None:
    """The rule for the best checkpoint, of those that have gauges.

    Among the steps whose pictures of unrelated prompts keep at least MIN_SHARPNESS of the untuned
    model's sharpness, the one whose student's style is nearest to the targets'.

    Args:
        rows: Of gauges.jsonl: {step, style, sharpness_ratio, ..}.
        saved: Steps of the checkpoints.
        moved: Go by the pictures on preview_model, which is where the LoRA will be used.

    Returns:
        The row; None if no checkpoint is sharp enough.
    """
    kind = MOVED if moved else ""
    sharp = [
        r for r in rows if r["step"] in set(saved) and r["step"] > 0 and f"{kind}style" in r
        and r.get(f"{kind}sharpness_ratio", 1.0) >= MIN_SHARPNESS
    ]
    return min(sharp, key=lambda r: r[f"{kind}style"], default=None)


def write_best(workdir: str | Path, best: dict[str, Any] | None, *, moved: bool = False) -> None:
    """<workdir>/best.json: the rule, and the row of `best_checkpoint`."""
    where = ", on preview_model" if moved else ""
    text = json.dumps({
        "rule": "nearest style to the targets among checkpoints with at least "
                f"{MIN_SHARPNESS:g} of the untuned model's sharpness on unrelated prompts{where}",
        "best": best,
    }, indent=2)
    write_atomic(Path(workdir) / BEST, text + "\n")
