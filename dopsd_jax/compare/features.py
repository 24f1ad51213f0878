"""CLIP and DINO from local directories, through transformers and torch: pictures -> directions.

Only `scores` imports this; the training path knows no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from dopsd_jax.core.log import counted
from dopsd_jax.data.images import read_image

BATCH = 8  # pictures at a time
# Tensors of a checkpoint that the features do not pass through.
UNUSED = ("pooler.", "position_ids", "mask_token")
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
# A plain ViT is DINO's first version; its pooler belongs to another task.
DINO_OPTIONS = {"vit": {"add_pooling_layer": False}}


class Clip:
    """Pictures and prompts as unit vectors of one space.

    Source: D-OPSD, z-image-turbo_self-distill-vlm/eval/run_score.py, which does it in open_clip.
        Differs from reference: float32, not float16.
    """

    def __init__(self, directory: str | Path, device: str = "cpu"):
        """Raises ValueError: no CLIP, or weights that are not all there."""
        check_type(directory, ("clip",))
        self.model = self.network(directory).to(device).eval()
        self.prepare = self.preparation(directory)
        self.tokenizer = from_files(transformers.AutoTokenizer, directory)
        self.longest = self.model.config.text_config.max_position_embeddings
        self.scale = math.exp(self.model.logit_scale.item())
        self.device = device

    def network(self, directory: str | Path) -> transformers.CLIPModel:
        """The network with its weights."""
        return load_network(transformers.CLIPModel, directory)

    def preparation(self, directory: str | Path) -> Callable[[list[Image.Image]], torch.Tensor]:
        """RGB pictures -> float32 [B, 3, H, W], as the network was trained with."""
        processor = image_processor(directory)
        return lambda images: prepared(processor, images)

    @torch.inference_mode()
    def images(self, files: Sequence[Path]) -> np.ndarray:
        """Pictures -> float32 [N, D], of length 1."""
        def features(batch):
            pixels = self.prepare([read_image(file) for file in batch])
            return self.model.get_image_features(pixels.to(self.device)).pooler_output

        return _directions(features, files)

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts -> float32 [N, D], of length 1; what is longer than CLIP reads is cut off."""
        def features(batch):
            tokens = self.tokenizer(list(batch), padding=True, truncation=True,
                                    max_length=self.longest, return_tensors="pt").to(self.device)
            return self.model.get_text_features(
                tokens.input_ids, attention_mask=tokens.attention_mask
            ).pooler_output

        return _directions(features, prompts, "prompts")

    def cosines(self, files: Sequence[Path], prompts: Sequence[str]) -> np.ndarray:
        """Of each picture and its prompt, float64 [N]."""
        return np.sum(self.images(files) * self.texts(prompts), 1, dtype=np.float64)

    def too_long(self, prompts: Sequence[str]) -> int:
        """How many prompts are not read to the end."""
        return sum(len(ids) > self.longest for ids in self.tokenizer(list(prompts)).input_ids)


class Dino:
    """Pictures as unit vectors: the mean of the patch tokens of DINO, DINOv2 or DINOv3.

    Source: as `Clip`.
        Differs from reference: a picture is prepared as the checkpoint's own processor says, so
        pictures of different sizes need no common one; there the reference is stretched to the
        drawn picture's size and both go in at that size, which `own_size=True` and `size` do.
    """

    def __init__(self, directory: str | Path, device: str = "cpu", *, own_size: bool = False):
        """Raises ValueError: no DINO, or weights that are not all there."""
        kind = check_type(directory, DINO_TYPES)
        model = load_network(transformers.AutoModel, directory, **DINO_OPTIONS.get(kind, {}))
        self.model = model.to(device).eval()
        # Class token and registers come before the patches.
        self.first_patch = 1 + getattr(self.model.config, "num_register_tokens", 0)
        self.any_size = {"interpolate_pos_encoding": True} if kind == "vit" else {}
        if own_size:
            mean, std = _mean_and_std(directory)
            self.prepared = lambda images: _normalised(images, mean, std)
        else:
            processor = image_processor(directory)
            self.prepared = lambda images: prepared(processor, images)
        self.device = device

    @torch.inference_mode()
    def images(self, files: Sequence[Path], size: tuple[int, int] | None = None) -> np.ndarray:
        """Pictures, with `own_size` stretched to `size` (width, height) -> float32 [N, D], of
        length 1."""
        def features(batch):
            images = [read_image(file) for file in batch]
            images = [stretch(image, size) for image in images] if size else images
            found = self.model(self.prepared(images).to(self.device), **self.any_size)
            return found.last_hidden_state[:, self.first_patch:].mean(1)

        return _directions(features, files)


def stretch(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture at exactly (width, height), bicubic, as the published evaluation does it."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _directions(features, items: Sequence, what: str = "pictures") -> np.ndarray:
    """features(batch) -> tensor [B, D] of all items, float32 [N, D], of length 1."""
    found = in_batches(features, items, what)
    return torch.nn.functional.normalize(found, dim=-1).numpy()


def in_batches(
    function: Callable[[list], torch.Tensor], items: Sequence, what: str
) -> torch.Tensor:
    """function(batch) -> tensor [B, ..] of all items, [N, ..]; what stands twice is done once."""
    distinct = list(dict.fromkeys(items))
    number = {item: i for i, item in enumerate(distinct)}
    found = []
    for i in counted(range(0, len(distinct), BATCH), len(distinct), what, each=BATCH):
        found.append(function(distinct[i : i + BATCH]).cpu())
    return torch.cat(found)[[number[item] for item in items]]


def check_type(directory: str | Path, expected: Sequence[str]) -> str:
    """The model_type of config.json, which must be one of `expected`."""
    file = Path(directory) / "config.json"
    try:
        kind = json.loads(file.read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file}: expected JSON with a model_type; download it again") from e
    if kind not in expected:
        raise ValueError(f"{file}: expected model_type {' or '.join(expected)}, got {kind!r:.40}")
    return kind


def from_files(kind, directory: str | Path, **options):
    """A transformers object from local files alone; no code of the directory is run."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return kind.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as e:  # transformers raises nearly anything on damaged files
        raise ValueError(
            f"{directory}: transformers cannot open it as {kind.__name__} "
            f"({type(e).__name__}: {e!s:.300})"
        ) from e


def load_network(kind, directory: str | Path, **options):
    """A float32 network from safetensors; every weight must come from the file."""
    model, found = from_files(
        kind, directory, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
        **options,
    )
    missing = sorted(k for k in found["missing_keys"] if not any(u in k for u in UNUSED))
    foreign = sorted(k for k in found["unexpected_keys"] if not any(u in k for u in UNUSED))
    if missing or foreign:
        raise ValueError(
            f"{directory}: expected exactly the weights of {type(model).__name__}; missing "
            f"{len(missing)} {missing[:3]}, not of it {len(foreign)} {foreign[:3]}; is it the "
            "checkpoint of another task?"
        )
    return model


def read_tensors(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of some safetensors files, float32."""
    return {name: x.float() for file in files for name, x in load_file(file).items()}


def fill(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], where: str | Path
) -> None:
    """Puts exactly these tensors into a network.

    Raises:
        ValueError: Tensors that it lacks, or that it has of other shapes, together.
    """
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    wrong = sorted(n for n in wanted.keys() | found if wanted.get(n) != found.get(n))
    if wrong:
        raise ValueError(
            f"{where}: expected exactly the weights of {type(model).__name__}, "
            f"{len(wrong)} tensors differ: " + "; ".join(
                f"{n}: expected {wanted.get(n, 'none')}, got {found.get(n, 'none')}"
                for n in wrong[:3]
            )
        )
    model.load_state_dict(dict(tensors))


def image_processor(directory: str | Path):
    """The checkpoint's own processor, resizing by PIL as all were made with.

    DINOv3's has no PIL form and needs torchvision.
    """
    try:
        return from_files(transformers.AutoImageProcessor, directory, backend="pil")
    except ValueError as e:
        if "torchvision" not in str(e).lower():
            raise
        raise ValueError(
            f"{directory}: its image processor needs torchvision, of the release that belongs to "
            f"torch {torch.__version__}; install it, or take --dino_size=drawn, which is what the "
            "published evaluation does and needs none"
        ) from e


def prepared(processor, images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures as a processor of transformers prepares them, float32 [B, 3, H, W]."""
    return processor(images=images, return_tensors="pt")["pixel_values"]


def _mean_and_std(directory: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The colours of preprocessor_config.json, float32 [3] each."""
    file = Path(directory) / "preprocessor_config.json"
    try:
        values = json.loads(file.read_text())
        mean, std = (np.array(values[k], np.float32) for k in ("image_mean", "image_std"))
        mean, std = np.broadcast_to(mean, 3), np.broadcast_to(std, 3)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{file}: expected image_mean and image_std of 3 numbers; download it again"
        ) from e
    return mean, std


def _normalised(
    images: Sequence[Image.Image], mean: np.ndarray, std: np.ndarray
) -> torch.Tensor:
    """RGB pictures of one size -> float32 [B, 3, H, W] at that size."""
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    return torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2)
