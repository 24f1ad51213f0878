"""Names and files: safetensors in and out, name tables, LoRA formats."""

from dopsd_jax.weights.names import WeightsError
from dopsd_jax.weights.pipeline import (
    Pipeline,
    VisionLanguage,
    load_pipeline,
    load_vision_language,
)

__all__ = [
    "Pipeline", "VisionLanguage", "WeightsError", "load_pipeline", "load_vision_language",
]
