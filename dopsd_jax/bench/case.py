"""What is measured: a size of the model, pictures and batch, the same for every side."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

STEPS = 4               # denoiser calls of the rollout
RANK, ALPHA = 64, 128
WARM_UPS = 2            # updates before any is timed

# Of transformer/config.json, as diffusers writes it.
_SHARED = dict(
    all_patch_size=[2], all_f_patch_size=[1], norm_eps=1e-5, qk_norm=True, rope_theta=256.0,
    t_scale=1000.0,
)
MODELS: dict[str, dict[str, Any]] = {
    "z-image": _SHARED | dict(
        in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30,
        cap_feat_dim=2560, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512],
    ),
    "small": _SHARED | dict(
        in_channels=16, dim=128, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4,
        cap_feat_dim=64, axes_dims=[8, 12, 12], axes_lens=[1536, 512, 512],
    ),
}
# Of weights and activations: the small one is for CPUs, on which bfloat16 is slow.
DTYPES = {"z-image": "bfloat16", "small": "float32"}
# Linear layers that carry LoRA, as the published trainer names them.
TARGETS = (
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        model: Of MODELS.
        side: Of the pictures, pixels.
        batch: Pictures per update.
        updates: Timed ones; their median counts.
        student_tokens, teacher_tokens: Of the two contexts.
        remat: Rematerialisation policy, of ours alone.
        base_dtype: Of the frozen layers, of ours alone; see the key of a run.
        compiled: Whether torch compiles its blocks.
    """

    model: str
    side: int
    batch: int
    updates: int = 10
    student_tokens: int = 128
    teacher_tokens: int = 512
    remat: str = "full"
    base_dtype: str = "dtype"
    compiled: bool = False

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h, w, C] of one picture."""
        return self.side // 8, self.side // 8, MODELS[self.model]["in_channels"]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        return cls(**json.loads(text))


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a side says of a case.

    Attributes:
        first_seconds: From the first call of the step to its result, compilation included.
        seconds: Median of an update after that.
        slowest: Slowest of the timed updates, seconds.
        peak_bytes: Of device memory; 0 where the device does not tell.
        loss: Of the last update, finite.
        device: Its name.
    """

    first_seconds: float
    seconds: float
    slowest: float
    peak_bytes: int
    loss: float
    device: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))
