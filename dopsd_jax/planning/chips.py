"""What a chip can do, by the maker's figures, and how much of that programs like these reach."""

from __future__ import annotations

import dataclasses
import math
import re

from dopsd_jax.core.cli import MEM_FRACTION
from dopsd_jax.planning.gpus import GPUS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
        kind: How it names itself to JAX.
        sides: How many numbers the shape of several chips has; 0: it is planned for alone.
        peak: FLOPs per second of dense bfloat16 products.
        memory: Bytes a program may use.
        bandwidth: Bytes per second of its memory.
        links: Bytes per second to all neighbours together, one way.
        clock: Cycles per second, such that the peak is what its matrix units do in one; 0 where
            the compiler expects no cycles.
        linear: Share of the peak that large linear layers reach, with all that goes on between
            them.
        attention: Share of the peak that attention kernels reach.
        rests: What the two shares rest on, in words.
        target: What XLA compiles for where the device is not there; of GPUs.
    """

    kind: str
    sides: int
    peak: float
    memory: float
    bandwidth: float
    links: float
    clock: float
    linear: float
    attention: float = 0.5
    rests: str = "assumed of attention kernels, not measured"
    target: str = ""


# peak, memory bandwidth, links: cloud.google.com/tpu/docs/v5e, /v5p, /v6e, "System
# architecture" (of the links' bandwidth half: one way). memory: what the compiler of libtpu
# 0.0.42.1 allows a program, from its messages for programs that need more.
# linear: from the cycles that the same compiler expects of Z-Image's whole LoRA step with remat
# matmuls (`plan --full`; v5e:4x4, v5p:2x2x4, v6e:4x4), less attention. Other policies were not
# built: that they reach the same share is assumed.
TPUS = {
    "v5e": Chip("TPU v5 lite", 2, 197e12, 15.75 * GIB, 819e9, 100e9, 1.5e9, 0.51),
    "v5p": Chip("TPU v5", 3, 459e12, 95.74 * GIB, 2765e9, 300e9, 1.75e9, 0.48),
    "v6e": Chip("TPU v6 lite", 2, 918e12, 31.25 * GIB, 1640e9, 224e9, 1.75e9, 0.28),
}

# Of a card's memory what JAX takes when it starts, see core/cli.py.
MEMORY_SHARE = float(MEM_FRACTION)
# Dense bfloat16 products that add up in float32, by NVIDIA's data sheets.
PEAKS = {"h100": 989.4e12, "h200": 989.4e12, "a100-80": 312e12, "a100-40": 312e12,
         "l40s": 362e12, "4090": 165.2e12, "3090": 71e12, "4080": 97.5e12, "4070": 58.3e12,
         "3060": 25.5e12}
# Both shares are an H100's, measured at N = 4608 (remat matmuls: 2.01 s busy, .395 of them in
# attention); of other cards they are assumed to be the same.
MEASURED = {"linear": 0.43, "attention": 0.42}


def _gpu_chip(name: str) -> Chip:
    gpu = GPUS[name]
    rests = "measured on an H100" + ("" if name == "h100" else ", assumed of this card")
    return Chip(gpu.name, 0, PEAKS[name], MEMORY_SHARE * gpu.memory, gpu.bandwidth, 1.0, 0.0,
                rests=rests, target=gpu.target(), **MEASURED)


CHIPS = TPUS | {name: _gpu_chip(name) for name in GPUS}


MOST_CHIPS = 16_384  # more than any slice has


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:4x4", or of one card such as "h100".

    Raises:
        ValueError: A generation that is not in CHIPS, or no topology at all.
    """
    if topology in GPUS:
        return CHIPS[topology]
    generation, _, shape = topology.partition(":")
    sides = shape.split("x")
    is_shape = all(re.fullmatch("[1-9][0-9]*", side) for side in sides)
    if (generation not in TPUS or not is_shape or len(sides) != CHIPS[generation].sides
            or count_chips(topology) > MOST_CHIPS):
        raise ValueError(
            f"topology: expected a generation of {', '.join(TPUS)} and its shape of at "
            f"most {MOST_CHIPS} chips, such as v5e:4x4, v6e:4x4 or v5p:2x2x1, or one card of "
            f"{', '.join(GPUS)}, got {topology!r}"
        )
    return CHIPS[generation]


def count_chips(topology: str) -> int:
    shape = topology.partition(":")[2]
    return math.prod(int(side) for side in shape.split("x")) if shape else 1
