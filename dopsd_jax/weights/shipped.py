"""Models by name: those that come with the package, and those of the hub."""

from __future__ import annotations

from pathlib import Path

from dopsd_jax.weights import hub

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PIPELINES = {"mini": ASSETS / "mini"}
VISION_LANGUAGE = {"mini": ASSETS / "mini_qwen3_vl"}
# A LoRA on mini's transformer that undoes its distillation.
UNDISTILLED = ASSETS / "mini_undistilled.safetensors"
# A VAE trained on today's mini world, which the next mini model is made with; see mini/make.py.
MINI_VAE = ASSETS / "mini_vae"
JUDGE = ASSETS / "mini_judge.safetensors"  # of what mini was trained on; see mini/judge.py
# Of today's mini world, which has more styles and things; it tells too how many and where.
WIDE_JUDGE = ASSETS / "mini_judge_wide.safetensors"


def pipeline_directory(
    name: str | Path, *, weights: bool | tuple[str, ...] = True
) -> Path:
    """The directory of a pipeline, by its path, or by a name that is no path here.

    Args:
        name: A path; a shipped pipeline's name; or one of the hub, see `hub.fetch`.
        weights: Whether its weights are needed, or those of which folders.

    Raises:
        ValueError: A name of the hub that cannot be had.
    """
    return _find(PIPELINES, name, pipeline=True, weights=weights)


def vlm_directory(name: str | Path, *, weights: bool = True) -> Path:
    """As `pipeline_directory`, for the Qwen3-VL beside it."""
    return _find(VISION_LANGUAGE, name, pipeline=False, weights=weights)


def _find(
    shipped: dict[str, Path], name: str | Path, *, pipeline: bool, weights: bool | tuple[str, ...]
) -> Path:
    if Path(name).exists():
        return Path(name)
    if str(name) in shipped:
        return shipped[str(name)]
    if hub.is_name(str(name)):
        return hub.fetch(str(name), pipeline=pipeline, weights=weights)
    return Path(name)
