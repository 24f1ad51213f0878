"""How many floating-point operations a train step needs, counted from shapes, part by part.

One multiplication and one addition of a matrix product are two. Everything that is no matrix
product is left out, and so is the one by which a TPU rotates (rope.py), which moves numbers and
adds none up: all of it is about one percent.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from dopsd_jax.core import trees
from dopsd_jax.models import adapters
from dopsd_jax.models.denoiser import Denoiser


@dataclasses.dataclass(frozen=True)
class Count:
    """FLOPs of one forward pass over one picture.

    Attributes:
        base: Products with the network's own weights.
        lora: Products with the factors of an adapter.
        attention: Queries with keys, and weights with values.
        matmuls_again: See `denoiser.Passes`.
    """

    base: float
    lora: float
    attention: float
    matmuls_again: float = 1.0

    @property
    def total(self) -> float:
        return self.base + self.lora + self.attention


def forward(
    denoiser: Denoiser, params: trees.Tree, lora: trees.Tree | None, *, image: int, text: int,
    references: int = 0,
) -> Count:
    """One evaluation of the denoiser for one picture.

    Args:
        denoiser: Its family says which tokens pass where.
        params, lora: Trees of arrays or shapes; no LoRA: None.
        image, text, references: Tokens.

    Raises:
        ValueError: Every layer of which it is not known what passes through.
    """
    passes, unknown = denoiser.passes(image, text, references), []

    def products(layer: str, multiplications: float) -> float:
        count = next((n for pattern, n in passes.layers if re.fullmatch(pattern, layer)), None)
        if count is None:
            unknown.append(f"{layer}/kernel")
        return 2.0 * (count or 0) * multiplications

    base = sum(
        products(name.removesuffix("/kernel"), float(np.prod(x.shape)))
        for name, x in trees.flatten(params).items() if name.endswith("/kernel")
    )
    added = sum(
        products(layer, adapters.products(leaves))
        for layer, leaves in adapters.sites(lora or {}).items()
    )
    if unknown:
        raise ValueError(f"FLOPs: it is not known how many tokens pass through {unknown}")
    flat, attention = trees.flatten(params), 0.0
    for stack, length in passes.attends.items():
        depth = next(x.shape[0] for n, x in flat.items() if n.startswith(f"{stack}/"))
        c = denoiser.network.config
        attention += depth * 4.0 * length**2 * c.dim
    return Count(base, added, attention, passes.matmuls_again)


@dataclasses.dataclass(frozen=True)
class Step:
    """FLOPs of one update per picture.

    Attributes:
        parts: What for -> how many. "recomputed" is what is done twice to save memory.
        attention: Of `computed`, those of attention kernels.
    """

    parts: dict[str, float]
    attention: float

    @property
    def useful(self) -> float:
        return self.computed - self.parts["recomputed"]

    @property
    def computed(self) -> float:
        return sum(self.parts.values())


# What share of a layer's forward products a policy of models/layers.py computes again; that of
# "matmuls" is the family's own.
_LINEAR_AGAIN = {"offload": 1.0, "full": 1.0, "attention": 1.0, "linears": 0.0, "dots": 0.0,
                 "activations": 0.0, "none": 0.0}
KERNELS_BACKWARD = 2.5  # attention kernels compute the weights again: five products for two


def train_step(
    student: Count, teacher: Count | None, num_steps: int, trainable: str, remat: str,
    retained: Count | None = None,
) -> Step:
    """One update: every rollout step evaluates the teacher once and the student with gradient.

    Args:
        student, teacher: Of one evaluation; no teacher: None.
        num_steps: S.
        trainable: "lora": the gradient passes through the base, whose weights get none; "full".
        remat: Policy of the layers.
        retained: Of one evaluation of the model to be retained, if the loss asks one.
    """
    weights = student.base if trainable == "full" else student.lora
    watching = teacher.total if teacher else 0.0
    attention_again = student.attention if remat in ("offload", "full") else 0.0
    share = student.matmuls_again if remat == "matmuls" else _LINEAR_AGAIN[remat]
    again = share * (student.base + student.lora) + attention_again
    parts = {
        "teacher forward": watching,
        "student forward": student.total,
        # Through every product once; attention has two operands, each with a gradient.
        "student backward": student.base + student.lora + weights + 2 * student.attention,
        "recomputed": again,
    }
    kernels = (1 + KERNELS_BACKWARD) * student.attention + attention_again
    if retained:
        parts["retained forward"] = retained.total
    kernels += sum(count.attention for count in (teacher, retained) if count)
    return Step({k: num_steps * v for k, v in parts.items()}, num_steps * kernels)
