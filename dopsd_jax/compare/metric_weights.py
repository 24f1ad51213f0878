"""What the metrics need on disk, and what to download where it is missing; needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from dopsd_jax.weights import hub
from dopsd_jax.weights.load import shard_names
from dopsd_jax.weights.mapped import PICKLES, open_safetensors

VGG, HEADS = "model.safetensors", "lpips_vgg.safetensors"
# Colours that CLIP was trained with, and ImageReward after it.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure of a picture.

    Attributes:
        weights: Which directory it reads: a key of `DOWNLOADS`.
        against: "prompt" or "reference".
        higher_is_better: Whether a larger figure means more alike, or better liked.
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
    "pickscore": Metric("pickscore", "prompt", True,
                        "PickScore: cosine of picture and prompt, times the network's own scale"),
    "hpsv2": Metric("hpsv2", "prompt", True, "HPS v2: cosine of picture and prompt"),
    "imagereward": Metric("imagereward", "prompt", True, "ImageReward of picture and prompt"),
}

WITH_CLIP_TOKENIZER = ("clip", "pickscore", "hpsv2")

# Commands for the user's side, to be given once in the directory in question.
CONVERT_DINO = (
    'python -c "from transformers import ViTModel; '
    "ViTModel.from_pretrained('.').save_pretrained('.')\""
)
CONVERT_HEADS = (
    'python -c "import torch, safetensors.torch as s; s.save_file('
    f"torch.load('vgg.pth', 'cpu', weights_only=True), '{HEADS}')\""
)
CONVERT_HPS = (
    'python -c "import torch, safetensors.torch as s; '
    "t = torch.load('HPS_v2.1_compressed.pt', 'cpu', weights_only=True)['state_dict']; "
    "s.save_file({k: v.contiguous() for k, v in t.items()}, 'model.safetensors')\""
)
CONVERT_REWARD = (
    'python -c "import torch, safetensors.torch as s; '
    "t = torch.load('ImageReward.pt', 'cpu', weights_only=True); "
    "s.save_file({k: v.contiguous() for k, v in t.items()}, 'model.safetensors')\""
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
    "pickscore": """\
--pickscore: repository yuvalkirstain/PickScore_v1, its files as for --clip: config.json,
    preprocessor_config.json, model.safetensors, tokenizer_config.json, tokenizer.json.""",
    "hpsv2": f"""\
--hpsv2: a directory with config.json, tokenizer_config.json and tokenizer.json of repository
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K, and the tensors of HPS in model.safetensors, by the names
    of open_clip or of transformers' CLIPModel. Its makers publish a pickle, which is never read
    here: repository xswu/HPSv2, file HPS_v2.1_compressed.pt (v2.0: HPS_v2_compressed.pt); convert
    it once on your side, in that directory:
      {CONVERT_HPS}
    A conversion by others: repository RE-N-Y/hpsv21, file model.safetensors""",
    "imagereward": f"""\
--imagereward: a directory with vocab.txt of repository google-bert/bert-base-uncased, and the
    tensors of ImageReward in model.safetensors. Its makers publish a pickle, which is never read
    here: repository THUDM/ImageReward, file ImageReward.pt; convert it once on your side, in that
    directory:
      {CONVERT_REWARD}
    A conversion by others: repository RE-N-Y/ImageReward, file model.safetensors""",
}


def define_flags() -> None:
    """A flag for the weights of each metric, where torch computes, and which metrics."""
    for name in DOWNLOADS:
        flags.DEFINE_string(name, None, f"Directory of {name.upper()} weights, or the name of a "
                            "repository of the hub that has all its files.")
    flags.DEFINE_list("metrics", None, f"Some of {', '.join(METRICS)}; default: all whose weights "
                      "are given.")
    flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "Where torch computes.")


def given_weights() -> dict[str, str | None]:
    """What the flags of `define_flags` say: key of `DOWNLOADS` -> directory or name, or None."""
    return {name: flags.FLAGS[name].value for name in DOWNLOADS}


def chosen_metrics(
    metrics: Sequence[str] | None, weights: Mapping[str, str | None], *, references: bool
) -> list[str]:
    """The metrics asked for; None: all that the given weights and references allow.

    Args:
        metrics: Keys of `METRICS`, or None.
        weights: As for `check_weights`.
        references: Whether there are pictures to compare with.

    Raises:
        ValueError: Unknown metrics, or weights that are given for nothing.
    """
    if metrics is not None:
        unknown = [m for m in metrics if m not in METRICS]
        if unknown or not metrics:
            raise ValueError(f"metrics: expected some of {', '.join(METRICS)}, got {unknown}")
        return list(metrics)
    possible = [m for m in METRICS if references or METRICS[m].against == "prompt"]
    given = [name for name, where in weights.items() if where is not None]
    useless = [w for w in given if w not in {METRICS[m].weights for m in possible}]
    if useless:
        raise ValueError(
            f"{', '.join(f'--{w}' for w in useless)}: compares with references; name --references, "
            "or leave it out"
        )
    return [m for m in possible if METRICS[m].weights in given or not given]


def check_weights(
    metrics: Sequence[str], weights: Mapping[str, str | Path | None]
) -> dict[str, Path]:
    """Where the weights of some metrics lie; refuses what is missing, before it is read.

    Args:
        metrics: Keys of `METRICS`.
        weights: Key of `DOWNLOADS` -> directory, name on the hub (see `hub.fetch`), or None.

    Raises:
        ValueError: For all weights that a metric needs and that are not named or not complete:
            what is missing and what to download; or a name of the hub that cannot be had.
    """
    found, problems = {}, []
    for kind in dict.fromkeys(METRICS[m].weights for m in metrics):
        place = weights[kind]
        if place is not None and not Path(place).exists() and hub.is_name(str(place)):
            place = hub.fetch(str(place), pipeline=False, weights=True)
        missing = _missing(kind, place)
        if missing:
            asking = [m for m in metrics if METRICS[m].weights == kind]
            problems.append(f"{', '.join(asking)}: {missing}\n  {DOWNLOADS[kind]}")
        else:
            found[kind] = Path(place)
    if problems:
        raise ValueError(
            "weights are missing. For each metric, what to get:\n" + "\n".join(problems)
            + "\nor ask for fewer metrics, such as --metrics=clip_text"
        )
    return found


def _missing(kind: str, directory: str | Path | None) -> str:
    """What `directory` lacks, or ""."""
    if directory is None:
        return f"--{kind} is not given"
    place = Path(directory)
    if not place.is_dir():
        pickle = ", a pickle, which is never read here" if place.suffix in PICKLES else ""
        return (f"{place}: expected a directory, found a file{pickle}" if place.is_file()
                else f"{place}: no such directory")
    files = {
        "lpips": [VGG, HEADS], "imagereward": ["vocab.txt", *shards(place)],
        "hpsv2": ["config.json", *shards(place)],
    }.get(kind) or ["config.json", "preprocessor_config.json", *shards(place)]
    lacking = [name for name in files if not (place / name).is_file()]
    if kind in WITH_CLIP_TOKENIZER and not (place / "tokenizer.json").is_file():
        lacking += [n for n in ("vocab.json", "merges.txt") if not (place / n).is_file()]
    if lacking:
        return f"{place} lacks {', '.join(lacking)}"
    for name in files:
        if name.endswith(".safetensors"):
            with open_safetensors(place / name):  # says which file is cut off or no safetensors
                pass
    return ""


def shards(place: Path) -> list[str]:
    """The weight files that transformers reads: model.safetensors, or the shards of its index."""
    index = place / "model.safetensors.index.json"
    if (place / "model.safetensors").is_file() or not index.is_file():
        return ["model.safetensors"]
    return shard_names(index)
