"""Weights of 8 and 4 bits with scales, as ComfyUI's files have them, seen as what they stand for.

    float8    X.weight, and for it X.weight_scale or X.scale_weight: one number, or one per row
    int8      the same; with `convrot`, groups of a row's values are rotated by a Hadamard matrix
    nvfp4     X.weight, two values in a byte; X.weight_scale, float8, one per 16 values of a row;
              X.weight_scale_2, one number

`X.comfy_quant`, JSON in bytes, or the entry `_quantization_metadata` of the file's header says
which; the older marker is a tensor called `scaled_fp8`. X.input_scale and X.scale_input are for
computing in float8, which is not done here.

Source: ComfyUI's QUANTIZATION.md and `convert_old_quants`; comfy-kitchen's layouts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from dopsd_jax.core.checks import is_whole
from dopsd_jax.weights.mapped import Stored
from dopsd_jax.weights.names import WeightsError

METADATA = "_quantization_metadata"
MARKER, FORMAT = "scaled_fp8", "comfy_quant"
UNUSED = ("input_scale", "scale_input")
SCALES = ("weight_scale", "scale_weight")
SECOND = "weight_scale_2"
OTHERS = ("pre_quant_scale",)  # scales that are known and not read
FLOAT8 = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
INT8, NVFP4 = "int8_tensorwise", "nvfp4"
SCALED = FLOAT8 | {INT8: np.int8}
# Of a layer's entry; all others would change what its weights mean.
HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape"}
ROTATED, GROUP = "convrot", "convrot_groupsize"
E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK = 16  # values of a row that share a scale
H4 = np.float32([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
ADVICE = "take the model's file in bfloat16, float16 or float8"


@dataclass(frozen=True)
class Scaled:
    """An 8-bit tensor times its scale, in float32.

    Attributes:
        stored: The tensor, float8 or int8.
        scale: float32, of one element or [rows, 1, ..].
        group: How many values of a row are rotated together, a power of 4; 0: none.
    """

    stored: Stored
    scale: np.ndarray
    group: int = 0
    dtype = np.dtype(np.float32)
    kept = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def view(self) -> np.ndarray:
        """Its values; all 256 there can be are computed once and looked up."""
        values = np.arange(256, dtype=np.uint8).view(self.stored.dtype).astype(np.float32)
        if self.scale.size == 1:
            values = values * self.scale.reshape(())
        found = values[self.stored.view().view(np.uint8)]
        if self.scale.size > 1:
            np.multiply(found, self.scale, out=found)
        if not self.group:
            return found
        # Its own inverse, so that this undoes the rotation.
        turn = functools.reduce(np.kron, [H4 / 2] * (self.group.bit_length() // 2))
        return (found.reshape(-1, self.group) @ turn).reshape(found.shape)

    def split(self, parts: int) -> list[Scaled]:
        """Equal parts along the first axis."""
        scales = [self.scale] * parts if self.scale.size == 1 else np.split(self.scale, parts)
        return [Scaled(*pair, self.group)
                for pair in zip(self.stored.split(parts), scales, strict=True)]

    def forget(self) -> None:
        self.stored.forget()


@dataclass(frozen=True)
class Nvfp4:
    """A matrix of 4-bit floats (E2M1) in blocks with scales of their own, in float32.

    Attributes:
        stored: uint8 [rows, columns / 2], the value of the lower column in the upper bits.
        blocks: float8 scales, one per block, in the tiled order of cuBLAS: 128 rows by 4 blocks,
            of which 32 rows lie side by side.
        scale: float32 [], of the whole matrix.
        rows: Which rows of the matrix are meant.
    """

    stored: Stored
    blocks: Stored
    scale: np.ndarray
    rows: slice
    dtype = np.dtype(np.float32)
    kept = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows.stop - self.rows.start, 2 * self.stored.shape[1])

    def view(self) -> np.ndarray:
        packed = self.stored.view()[self.rows]
        values = E2M1[np.stack([packed >> 4, packed & 15], -1)].reshape(len(packed), -1, BLOCK)
        count = values.shape[1]
        tiles = self.blocks.view().astype(np.float32).reshape(-1, _up(count, 4) // 4, 32, 4, 4)
        scales = tiles.transpose(0, 3, 2, 1, 4).reshape(len(tiles) * 128, -1)
        scales = self.scale * scales[self.rows, :count]
        return (values * scales[..., None]).reshape(self.shape)

    def split(self, parts: int) -> list[Nvfp4]:
        """Equal parts along the first axis."""
        size = self.shape[0] // parts
        starts = [self.rows.start + i * size for i in range(parts)]
        return [replace(self, rows=slice(start, start + size)) for start in starts]

    def forget(self) -> None:
        self.stored.forget()


Tensor = Stored | Scaled | Nvfp4


def values(
    stored: Mapping[str, Stored], layers: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file with scales and markers taken in by what they belong to.

    Args:
        stored: By name.
        layers: Layer -> its entry in the file's header.

    Returns:
        Tensors by name, and what cannot be read, with the reason.
    """
    found: dict[str, Tensor] = dict(stored)
    layers, problems = dict(layers), []
    for name in stored:
        layer, _, last = name.rpartition(".")
        if last == FORMAT:
            del found[name]
            try:
                layers[layer] = json.loads(stored[name].view().tobytes())
            except ValueError as e:
                problems.append(f"{name}: expected JSON in bytes, found something else ({e})")
        elif last == MARKER or (last in UNUSED and f"{layer}.weight" in stored):
            del found[name]
    for name in stored:
        layer, _, last = name.rpartition(".")
        if last != "weight":
            continue
        scales = {s: found.pop(f"{layer}.{s}") for s in (*SCALES, SECOND, *OTHERS)
                  if f"{layer}.{s}" in found}
        try:
            found[name] = _decoded(stored[name], scales, layers.get(layer))
        except WeightsError as e:
            problems.append(f"{name}: {e}")
    one = np.ones((), np.float32)
    for name, tensor in found.items():
        if isinstance(tensor, Stored) and tensor.dtype in FLOAT8.values():
            found[name] = Scaled(tensor, one)
    return found, problems


def _decoded(weight: Stored, scales: dict[str, Stored], entry: Any) -> Tensor:
    """A layer's weight with its scales.

    Raises:
        WeightsError: A format that is not read, or scales that do not fit the weight.
    """
    if entry is not None and (not isinstance(entry, dict) or entry.get("format") is None):
        raise WeightsError(f"expected an entry that names its format, got {entry!r:.80}")
    kind = (entry or {}).get("format")
    if kind not in (None, NVFP4, *SCALED):
        raise WeightsError(f"stored as {kind}, which is not read here; {ADVICE}")
    known = HARMLESS | ({ROTATED, GROUP} if kind == INT8 else set())
    if strange := sorted((entry or {}).keys() - known):
        raise WeightsError(f"stored as {kind} with {', '.join(strange)}, which is not read here; "
                           f"{ADVICE}")
    if other := [s for s in OTHERS if s in scales]:
        raise WeightsError(f"has a {other[0]}, which is not read here; {ADVICE}")
    if kind == NVFP4 or SECOND in scales:
        return _nvfp4(weight, scales)
    given = [s for s in SCALES if s in scales]
    if len(given) > 1:
        raise WeightsError(f"expected one scale, found {' and '.join(given)}")
    if kind is None and not given:
        return weight
    if weight.dtype not in ((SCALED[kind],) if kind else FLOAT8.values()):
        raise WeightsError(
            f"expected {kind or 'float8'} beside {given[0] if given else FORMAT}, found "
            f"{weight.dtype}; {ADVICE}"
        )
    if not given:
        raise WeightsError(f"stored as {kind}, but its {SCALES[0]} is missing")
    scale = _numbers(scales[given[0]], given[0])
    group = _group(entry, weight) if kind == INT8 else 0
    if scale.size == 1:
        return Scaled(weight, scale.reshape(()), group)
    if not weight.shape or scale.size != weight.shape[0] or scale.shape[0] != scale.size:
        raise WeightsError(
            f"expected a {given[0]} of one number or one per row, {weight.shape[:1]}, found "
            f"{scale.shape}; {ADVICE}"
        )
    return Scaled(weight, scale.reshape(-1, *[1] * (len(weight.shape) - 1)), group)


def _group(entry: dict, weight: Stored) -> int:
    """How many values of a row of an int8 matrix are rotated together; 0: none."""
    if not entry.get(ROTATED):
        return 0
    group = entry.get(GROUP, 256)
    columns = weight.shape[-1] if len(weight.shape) == 2 else 0
    if not is_whole(group) or group < 4 or 4 ** (group.bit_length() // 2) != group or (
        not columns or columns % group
    ):
        raise WeightsError(f"expected a {GROUP} that is a power of 4 and divides the {columns} "
                           f"columns, got {group!r:.40}")
    return group


def _nvfp4(weight: Stored, scales: dict[str, Stored]) -> Nvfp4:
    missing = [s for s in (SCALES[0], SECOND) if s not in scales]
    if missing:
        raise WeightsError(f"stored as {NVFP4}, but its {' and '.join(missing)} is missing")
    blocks = scales[SCALES[0]]
    rows, packed = weight.shape if len(weight.shape) == 2 else (0, 1)
    count = _up(rows, 128) * _up(2 * packed // BLOCK, 4)
    if (weight.dtype != np.uint8 or 2 * packed % BLOCK or
            blocks.dtype != FLOAT8["float8_e4m3fn"] or np.prod(blocks.shape, dtype=int) != count):
        raise WeightsError(
            f"expected {NVFP4}, bytes [rows, columns / 2] with {count} scales in float8, found "
            f"{weight.dtype} {weight.shape} with {blocks.dtype} {blocks.shape}"
        )
    scale = _numbers(scales[SECOND], SECOND)
    if scale.size != 1:
        raise WeightsError(f"expected a {SECOND} of one number, found {scale.shape}")
    return Nvfp4(weight, blocks, scale.reshape(()), slice(0, rows))


def _numbers(scale: Stored, name: str) -> np.ndarray:
    """Scales in float32."""
    if scale.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        raise WeightsError(f"expected a {name} of floats, found {scale.dtype}; {ADVICE}")
    found = scale.view().astype(np.float32)
    if not np.isfinite(found).all():
        raise WeightsError(f"its {name} holds NaN or infinity")
    return found


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
