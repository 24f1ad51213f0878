"""Models that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PIPELINES = {"mini": ASSETS / "mini"}
VISION_LANGUAGE = {"mini": ASSETS / "mini_qwen3_vl"}
# A LoRA on mini's transformer that undoes its distillation.
UNDISTILLED = ASSETS / "mini_undistilled.safetensors"
# A VAE trained on today's mini world, which the next mini model is made with; see mini/make.py.
MINI_VAE = ASSETS / "mini_vae"
JUDGE = ASSETS / "mini_judge.safetensors"  # see mini/judge.py


def pipeline_directory(name: str | Path) -> Path:
    """The directory of a shipped pipeline's name; any other path, or a folder so called, as is."""
    return _find(PIPELINES, name)


def vlm_directory(name: str | Path) -> Path:
    """As `pipeline_directory`, for the Qwen3-VL beside it."""
    return _find(VISION_LANGUAGE, name)


def _find(shipped: dict[str, Path], name: str | Path) -> Path:
    return Path(name) if Path(name).exists() else shipped.get(str(name), Path(name))
