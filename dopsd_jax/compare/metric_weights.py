"""What the metrics need on disk, and what to download where it is missing; needs no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dopsd_jax.weights.load import open_safetensors

VGG, HEADS = "model.safetensors", "lpips_vgg.safetensors"


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure of a picture.

    Attributes:
        weights: Which directory it reads: a key of `DOWNLOADS`.
        against: "prompt" or "reference".
        higher_is_better: Whether a larger figure means more alike.
        meaning: In words.
    """

    weights: str
    against: str
    higher_is_better: bool
    meaning: str


METRICS = {
    "clip_text": Metric("clip", "prompt", True, "cosine of picture and prompt in CLIP"),
    "clip_image": Metric("clip", "reference", True, "cosine of picture and reference in CLIP"),
    "dino": Metric("dino", "reference", False,
                   "1 - cosine of the mean patch tokens of picture and reference in DINO"),
    "lpips": Metric("lpips", "reference", False, "LPIPS (VGG16) of picture and reference"),
}

# Commands for the user's side, to be given once in the directory in question.
CONVERT_DINO = (
    'python -c "from transformers import ViTModel; '
    "ViTModel.from_pretrained('.').save_pretrained('.')\""
)
CONVERT_HEADS = (
    'python -c "import torch, safetensors.torch as s; s.save_file('
    f"torch.load('vgg.pth', 'cpu', weights_only=True), '{HEADS}')\""
)
DOWNLOADS = {
    "clip": """\
--clip: a CLIP directory of transformers: config.json, preprocessor_config.json, model.safetensors,
    tokenizer_config.json, and tokenizer.json or vocab.json with merges.txt.
    As published (ViT-H/14 of open_clip): repository laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    Smaller, often reported: repository openai/clip-vit-large-patch14""",
    "dino": f"""\
--dino: a DINO directory of transformers: config.json, preprocessor_config.json, model.safetensors.
    As published (DINOv3 ViT-S+/16): repository facebook/dinov3-vits16plus-pretrain-lvd1689m
    DINOv2: repository facebook/dinov2-base
    DINO (v1): repository facebook/dino-vits16. Where it has only pytorch_model.bin, a pickle, which
    is never read here, convert it once on your side, in the folder that holds it:
      {CONVERT_DINO}""",
    "lpips": f"""\
--lpips: a directory with two files:
    {VGG}: repository timm/vgg16.tv_in1k, file model.safetensors: torchvision's ImageNet
      weights, tensors features.N.weight and features.N.bias (its classifier is not used).
    {HEADS}: tensors lin0.model.1.weight to lin4.model.1.weight. They are published as a
      pickle only, which is never read here; convert it once on your side, in that directory:
      pip download --no-deps lpips==0.1.4
      unzip -j lpips-0.1.4-py3-none-any.whl lpips/weights/v0.1/vgg.pth
      {CONVERT_HEADS}""",
}


def check_weights(metrics: Sequence[str], directories: Mapping[str, str | None]) -> None:
    """Refuses what is missing, before anything large is read.

    Args:
        metrics: Keys of `METRICS`.
        directories: "clip", "dino", "lpips" -> directory, or None.

    Raises:
        ValueError: For every directory that a metric needs and that is not named or not complete:
            what is missing and what to download.
    """
    problems = []
    for weights in dict.fromkeys(METRICS[m].weights for m in metrics):
        asking = [m for m in metrics if METRICS[m].weights == weights]
        missing = _missing(weights, directories[weights])
        if missing:
            problems.append(f"{', '.join(asking)}: {missing}\n  {DOWNLOADS[weights]}")
    if problems:
        raise ValueError(
            "weights are missing; nothing is downloaded here. For each metric, what to get:\n"
            + "\n".join(problems)
            + "\nor ask for fewer metrics, such as --metrics=clip_text"
        )


def _missing(weights: str, directory: str | None) -> str:
    """What `directory` lacks, or ""."""
    if directory is None:
        return f"--{weights} is not given"
    place = Path(directory)
    if not place.is_dir():
        return f"{place}: no such directory"
    if weights == "lpips":
        files = [VGG, HEADS]
    else:
        files = ["config.json", "preprocessor_config.json", *_shards(place)]
    lacking = [name for name in files if not (place / name).is_file()]
    if weights == "clip" and not (place / "tokenizer.json").is_file():
        lacking += [n for n in ("vocab.json", "merges.txt") if not (place / n).is_file()]
    if lacking:
        return f"{place} lacks {', '.join(lacking)}"
    for name in files:
        if name.endswith(".safetensors"):
            with open_safetensors(place / name):  # says which file is cut off or no safetensors
                pass
    return ""


def _shards(place: Path) -> list[str]:
    """The weight files that transformers reads: model.safetensors, or the shards of its index."""
    index = place / "model.safetensors.index.json"
    if (place / "model.safetensors").is_file() or not index.is_file():
        return ["model.safetensors"]
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{index}: expected JSON with a weight_map; download it again") from e
