"""LPIPS with VGG16, from two safetensors files. Only `score` imports this: it needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from dopsd_jax.compare.metric_weights import HEADS, VGG

# Numbers of the convolutions among `features` of VGG16, one row between two poolings. What comes
# out of the last of each row, after its ReLU, is compared.
ROWS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# Of pixels in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10
MIN_SIDE = 16  # four poolings


class Lpips:
    """Distance of two pictures of one size.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
    2018; the package lpips 0.1.4 with net="vgg", version 0.1, which the published evaluation uses.
    """

    def __init__(self, directory: str | Path, device: str = "cpu"):
        """Raises ValueError: tensors that are not VGG16's or the heads', all together."""
        vgg, heads = (_read(Path(directory) / name, device) for name in (VGG, HEADS))
        self.convolutions, self.heads = _checked(vgg, heads, directory)
        self.shift, self.scale = (
            torch.tensor(v, device=device)[None, :, None, None] for v in (SHIFT, SCALE)
        )
        self.device = device

    @torch.inference_mode()
    def distances(self, image: Image.Image, others: Iterable[Image.Image]) -> list[float]:
        """From one picture to each of some others; 0 for equal ones.

        Args:
            image, others: RGB, all of one size, sides of at least 16 pixels.

        Raises:
            ValueError: Other sizes.
        """
        ours = None
        found = []
        for other in others:
            if image.size != other.size or min(image.size) < MIN_SIDE:
                raise ValueError(
                    f"LPIPS: expected two pictures of one size with sides of at least {MIN_SIDE} "
                    f"pixels, got {image.size} and {other.size} (width, height)"
                )
            ours = ours or self._features(image)
            found.append(sum(
                F.conv2d((a - b) ** 2, head).mean().item()
                for a, b, head in zip(ours, self._features(other), self.heads, strict=True)
            ))
        return found

    def _features(self, image: Image.Image) -> list[torch.Tensor]:
        """Five feature maps [1, C, h, w], of length 1 along C."""
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1.0).to(self.device)
        x = (pixels.permute(2, 0, 1)[None] - self.shift) / self.scale
        found = []
        for number, row in enumerate(ROWS):
            x = F.max_pool2d(x, 2) if number else x
            for i in row:
                x = F.relu(F.conv2d(x, *self.convolutions[i], padding=1))
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + EPSILON))
        return found


def _read(file: Path, device: str) -> dict[str, torch.Tensor]:
    return {k: v.float() for k, v in load_file(file, device=device).items()}


def _checked(
    vgg: dict[str, torch.Tensor], heads: dict[str, torch.Tensor], directory: str | Path
) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    """Convolutions by number, (weight, bias), and one head per row; widths must follow."""
    numbers = [i for row in ROWS for i in row]
    wanted = {f"features.{i}.{part}" for i in numbers for part in ("weight", "bias")}
    found = {name for name in vgg if name.startswith("features.")}
    head_names = [f"lin{i}.model.1.weight" for i in range(len(ROWS))]
    problems = [
        f"{file}: {word} {', '.join(sorted(names)[:4])} ({len(names)} tensors)"
        for file, word, names in [
            (VGG, "lacks", wanted - found), (VGG, "is not of VGG16, has", found - wanted),
            (HEADS, "lacks", set(head_names) - heads.keys()),
        ] if names
    ]
    if not problems:
        width = 3
        for i in numbers:
            weight, bias = vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"]
            if weight.shape[1:] != (width, 3, 3) or bias.shape != weight.shape[:1]:
                problems.append(f"{VGG}: features.{i}: expected weight [C, {width}, 3, 3] and bias "
                                f"[C], got {list(weight.shape)} and {list(bias.shape)}")
            width = weight.shape[0]
        for name, row in zip(head_names, ROWS, strict=True):
            expected = [1, vgg[f"features.{row[-1]}.weight"].shape[0], 1, 1]
            if list(heads[name].shape) != expected:
                problems.append(
                    f"{HEADS}: {name}: expected {expected}, got {list(heads[name].shape)}"
                )
    if problems:
        raise ValueError(f"{directory}:\n  " + "\n  ".join(problems))
    convolutions = {i: (vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"]) for i in numbers}
    return convolutions, [heads[name] for name in head_names]
