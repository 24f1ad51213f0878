"""What a chip can do, by the maker's figures, and how much of that programs like these reach."""

from __future__ import annotations

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
        kind: How it names itself to JAX.
        sides: How many numbers the shape of several chips has.
        peak: FLOPs per second of dense bfloat16 products.
        memory: Bytes a program may use.
        bandwidth: Bytes per second of its memory.
        links: Bytes per second to all neighbours together, one way.
        clock: Cycles per second, such that the peak is what its matrix units do in one.
        linear: Share of the peak that large linear layers reach, with all that goes on between
            them.
    """

    kind: str
    sides: int
    peak: float
    memory: float
    bandwidth: float
    links: float
    clock: float
    linear: float


# peak, memory bandwidth, links: cloud.google.com/tpu/docs/v5e, /v5p, /v6e, "System
# architecture" (of the links' bandwidth half: one way). memory: what the compiler of libtpu
# 0.0.42.1 allows a program, from its messages for programs that need more.
# linear: from the cycles that the same compiler expects of Z-Image's whole LoRA step with remat
# matmuls (`plan --full`; v5e:4x4, v5p:2x2x4, v6e:4x4), less attention. Other policies were not
# built: that they reach the same share is assumed.
CHIPS = {
    "v5e": Chip("TPU v5 lite", 2, 197e12, 15.75 * GIB, 819e9, 100e9, 1.5e9, 0.51),
    "v5p": Chip("TPU v5", 3, 459e12, 95.74 * GIB, 2765e9, 300e9, 1.75e9, 0.48),
    "v6e": Chip("TPU v6 lite", 2, 918e12, 31.25 * GIB, 1640e9, 224e9, 1.75e9, 0.28),
}
ATTENTION = 0.5  # share of peak that attention kernels are assumed to reach; not measured


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:4x4".

    Raises:
        ValueError: A generation that is not in CHIPS, or no topology at all.
    """
    generation, _, shape = topology.partition(":")
    sides = shape.split("x")
    is_shape = all(re.fullmatch("[1-9][0-9]*", side) for side in sides)
    if generation not in CHIPS or not is_shape or len(sides) != CHIPS[generation].sides:
        raise ValueError(
            f"topology: expected a generation of {', '.join(CHIPS)} and its shape, such as "
            f"v5e:4x4, v6e:4x4 or v5p:2x2x1, got {topology!r}"
        )
    return CHIPS[generation]


def count_chips(topology: str) -> int:
    return math.prod(int(side) for side in topology.partition(":")[2].split("x"))
