"""HPS v2 and v2.1: a CLIP tuned on people's choices. Only `scores` imports this: it needs torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

from dopsd_jax.compare.features import Clip, fill, from_files, load_network, read_tensors
from dopsd_jax.compare.metric_weights import MEAN, STD, shards

MARK = "visual.conv1.weight"  # a tensor that only open_clip's layout has
PREFIXES = ("", "model.", "module.")
# Tensors of open_clip -> of transformers' CLIPModel; a transposed one ends with .T.
NAMES = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight.T",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight.T",
}
LAYER_NAMES = {
    "ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",
}
LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
IN_PROJECTION = "attn.in_proj_"  # queries, keys and values in one tensor
UNUSED = ("attn_mask", "position_ids")


class Hps(Clip):
    """Pictures and prompts as unit vectors; the score is their cosine, about 0.2 to 0.35.

    Source: the package hpsv2 1.2.0, img_score.py, with torchvision of 0.17 or newer, which resizes
        with antialiasing.
        Differs from reference: float32 throughout, where that computes under autocast.
    """

    def network(self, directory: str | Path) -> transformers.CLIPModel:
        files = [Path(directory) / name for name in shards(Path(directory))]
        tensors = read_tensors(files)
        if not any(prefix + MARK in tensors for prefix in PREFIXES):
            return load_network(transformers.CLIPModel, directory)
        config = from_files(transformers.CLIPConfig, directory)
        model = transformers.CLIPModel(config)
        fill(model, from_open_clip(tensors), directory)
        return model

    def preparation(self, directory: str | Path):
        size = self.model.config.vision_config.image_size
        return lambda images: torch.stack([squared(image, size) for image in images])


def squared(image: Image.Image, size: int) -> torch.Tensor:
    """An RGB picture whole in a black square, float32 [3, size, size], in CLIP's colours."""
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)
    scale = size / max(pixels.shape[1:])
    h, w = (round(side * scale) for side in pixels.shape[1:])
    if scale != 1:
        pixels = F.interpolate(
            pixels[None], (h, w), mode="bicubic", align_corners=False, antialias=True
        )[0]
    top, left = (size - h) // 2, (size - w) // 2
    pixels = F.pad(pixels, (left, size - w - left, top, size - h - top))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def from_open_clip(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a CLIP by open_clip's names -> by those of transformers' CLIPModel.

    Raises:
        ValueError: Tensors that neither layout has.
    """
    (prefix,) = (p for p in PREFIXES if p + MARK in tensors)
    found, foreign = {}, []
    for full, tensor in tensors.items():
        name = full.removeprefix(prefix)
        renamed = dict(_renamed(name, tensor)) if full.startswith(prefix) else {}
        found |= renamed
        if not renamed and not name.endswith(UNUSED):
            foreign.append(full)
    if foreign:
        raise ValueError(f"expected tensors of open_clip's CLIP, got {sorted(foreign)[:3]}")
    return found


def _renamed(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor of open_clip -> those of transformers that it becomes; none if it is unknown."""
    layer = LAYER.fullmatch(name)
    if not layer:
        for old, new in NAMES.items():
            rest = name.removeprefix(old) if old.endswith(".") else ""
            if name == old + rest:
                transposed = new.endswith(".T")
                yield new.removesuffix(".T") + rest, tensor.T if transposed else tensor
        return
    tower = "vision_model" if layer[1] else "text_model"
    start, part = f"{tower}.encoder.layers.{layer[2]}.", layer[3]
    if part.startswith(IN_PROJECTION):
        for role, piece in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{start}self_attn.{role}_proj.{part.removeprefix(IN_PROJECTION)}", piece
    for old, new in LAYER_NAMES.items():
        if part.startswith(old):
            yield start + new + part.removeprefix(old), tensor
