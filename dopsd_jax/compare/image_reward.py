"""ImageReward: BLIP and a head that was trained on people's choices.

Only `scores` imports this: it needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn

from dopsd_jax.compare.features import fill, from_files, in_batches, read_tensors
from dopsd_jax.compare.metric_weights import MEAN, STD, shards
from dopsd_jax.data.images import read_image

LONGEST = 35  # tokens of a prompt that are read
HEAD_WIDTH = 64  # channels of an attention head, in both towers
# Of the rewards of the training set, by which they are scaled.
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
# Tensors of the published file that the reward does not pass through.
UNUSED = ("vision_proj.", "text_proj.", "position_ids", "pooler.")
VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
# Of the picture's tower: ImageReward's names -> transformers'.
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


class ImageReward:
    """How much people would like a picture for a prompt; about -2 to 2.

    Source: the package image-reward 1.5, ImageReward.py and models/BLIP.
    """

    longest = LONGEST

    def __init__(self, directory: str | Path, device: str = "cpu"):
        """Raises ValueError: tensors that are not ImageReward's, or no vocabulary."""
        files = [Path(directory) / name for name in shards(Path(directory))]
        tensors = {
            name: x for name, x in read_tensors(files).items() if not any(u in name for u in UNUSED)
        }
        parts = _split(tensors, directory)
        try:
            self.vision = _vision(parts[VISION])
            self.text, self.head = _text(parts[TEXT]), Head(parts[HEAD])
        except (KeyError, IndexError, ValueError) as e:
            raise ValueError(
                f"{directory}: expected the weights of ImageReward, whose sizes are read from its "
                f"tensors; {e!r:.100}"
            ) from e
        for kind, network in ((VISION, self.vision), (TEXT, self.text), (HEAD, self.head)):
            fill(network, parts[kind], directory)
            network.to(device).eval()
        # The published code adds two tokens that no prompt has.
        self.tokenizer = from_files(transformers.BertTokenizer, directory)
        self.device = device

    @torch.inference_mode()
    def scores(self, files: Sequence[Path], prompts: Sequence[str]) -> np.ndarray:
        """Of each picture and its prompt, float64 [N]; longer prompts are cut off."""
        size = self.vision.config.image_size

        def rewards(batch):
            pixels = torch.stack([cropped(read_image(file), size) for file, _ in batch])
            seen = self.vision(pixels.to(self.device)).last_hidden_state
            tokens = self.tokenizer(
                [prompt for _, prompt in batch], padding="max_length", truncation=True,
                max_length=LONGEST, return_tensors="pt",
            ).to(self.device)
            read = self.text(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], device=self.device),
            ).last_hidden_state
            return self.head(read[:, 0])[:, 0]

        found = in_batches(rewards, list(zip(files, prompts, strict=True)), "pictures")
        return (found.numpy().astype(np.float64) - REWARD_MEAN) / REWARD_STD

    def too_long(self, prompts: Sequence[str]) -> int:
        """How many prompts are not read to the end."""
        return sum(len(ids) > LONGEST for ids in self.tokenizer(list(prompts)).input_ids)


class Head(nn.Module):
    """Linears one after the other, by their numbers in the file; only dropout stands between."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        numbers = sorted(int(n.split(".")[1]) for n in tensors if n.endswith(".weight"))
        self.layers = nn.ModuleDict({
            str(i): nn.Linear(*tensors[f"layers.{i}.weight"].shape[::-1]) for i in numbers
        })

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def cropped(image: Image.Image, size: int) -> torch.Tensor:
    """The middle of an RGB picture whose shorter side becomes `size`, in CLIP's colours.

    As torchvision's Resize (bicubic, on a PIL image) and CenterCrop do it.

    Returns:
        float32 [3, size, size].
    """
    short = min(image.size)
    width, height = (
        size if side == short else int(size * side / short) for side in image.size
    )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image, np.float32) / 255
    return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


def _split(
    tensors: Mapping[str, torch.Tensor], directory: str | Path
) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of the two towers and the head, by transformers' names."""
    parts: dict[str, dict[str, torch.Tensor]] = {VISION: {}, TEXT: {}, HEAD: {}}
    foreign = []
    for name, tensor in tensors.items():
        kind = next((k for k in parts if name.startswith(k)), None)
        if kind is None:
            foreign.append(name)
            continue
        short = name.removeprefix(kind)
        for old, new in VISION_NAMES if kind == VISION else ():
            short = re.sub(old, new, short)
        parts[kind][short] = tensor
    if foreign or not all(parts.values()):
        raise ValueError(
            f"{directory}: expected tensors whose names begin with {', '.join(parts)}, as in "
            f"ImageReward.pt; others: {sorted(foreign)[:3]} ({len(foreign)})"
        )
    return parts


def _layers(names: Mapping[str, torch.Tensor], start: str) -> int:
    return len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})


def _vision(tensors: Mapping[str, torch.Tensor]) -> transformers.BlipVisionModel:
    width, _, patch, _ = tensors["embeddings.patch_embedding.weight"].shape
    positions = tensors["embeddings.position_embedding"].shape[1] - 1
    return transformers.BlipVisionModel(transformers.BlipVisionConfig(
        hidden_size=width, num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(tensors, "encoder.layers."), patch_size=patch,
        image_size=patch * round(positions**0.5), layer_norm_eps=1e-6, hidden_act="gelu",
    ))


def _text(tensors: Mapping[str, torch.Tensor]) -> transformers.BlipTextModel:
    words, width = tensors["embeddings.word_embeddings.weight"].shape
    return transformers.BlipTextModel(transformers.BlipTextConfig(
        vocab_size=words, hidden_size=width, num_attention_heads=width // HEAD_WIDTH,
        encoder_hidden_size=tensors["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(tensors["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(tensors, "encoder.layer."), hidden_act="gelu",
        max_position_embeddings=len(tensors["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12, bos_token_id=None, sep_token_id=None, eos_token_id=None,
    ), add_pooling_layer=False)
