"""LoRA files on the layout of a network's makers, seen as if they were on diffusers'.

There the projections to q, k and v are one module, whose lora_B has the rows of all three, and
other modules have other names. A LoRA on such a module is three on the parts, with the same lora_A
each: what they add is exactly the same. The factors of a LoKr are left whole, as only both together
say what the rows of a part are: see `lokr_files.leaves`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from dopsd_jax.weights.lora_names import is_underscored
from dopsd_jax.weights.names import Modules, resolve, rule


@dataclass(frozen=True)
class _Source:
    """Where a tensor stands: a part of another one, or all of it.

    Attributes:
        key: Of the other one.
        rows, columns: (i, n), the i-th of n equal parts.
        shares: Among how many an alpha is divided.
        part: (i, n): of which of n equal parts of its module's rows it is, cut or not.
    """

    key: str
    rows: tuple[int, int] = (0, 1)
    columns: tuple[int, int] = (0, 1)
    shares: int = 1
    part: tuple[int, int] = (0, 1)

    def of(self, whole: np.ndarray) -> np.ndarray:
        if self.shares > 1:
            return whole.astype(np.float64) / self.shares
        for axis, (index, count) in enumerate((self.rows, self.columns)):
            if count > 1:
                whole = np.split(whole, count, axis)[index]
        return whole


class _Part:
    """Shape and dtype of a part of a tensor, as safetensors' slices tell them."""

    def __init__(self, whole: Any, source: _Source):
        self._whole, self._source = whole, source

    def get_shape(self) -> list[int]:
        shape = list(self._whole.get_shape())
        for axis, (_, count) in enumerate((self._source.rows, self._source.columns)):
            if count > 1:
                # What cannot be split has no good shape, which whoever reads it compares.
                shape[axis] = shape[axis] // count if shape[axis] % count == 0 else 0
        return shape

    def get_dtype(self) -> str:
        return self._whole.get_dtype()


@dataclass(frozen=True)
class _Fused:
    """A module of the makers' layout that is several in diffusers'.

    Attributes:
        names: Those, without the suffix of a tensor.
        keys: Part as in `lora_names.key_pattern` -> the tensor's name and suffix.
    """

    names: tuple[str, ...]
    keys: dict[str, tuple[str, str]]


class DiffusersView:
    """An open safetensors file of a LoRA by the names of diffusers' layout.

    A fused module whose lora_B is block-diagonal, so that each part has ranks of its own, is seen
    as LoRAs of these ranks, if all other modules have so many; parts whose lora_A is 0 have none.

    Args:
        handle: From `open_safetensors`.
        pattern: From `lora_names.key_pattern`.
        modules: Of the network.

    Attributes:
        problems: Tensors that stand for the same weight as another one.
    """

    def __init__(self, handle: Any, pattern: re.Pattern, modules: Modules):
        self._handle, self.problems = handle, []
        names = sorted(handle.keys())
        matches = {name: m for name in names if (m := pattern.fullmatch(name))}
        fused = _fused(matches, modules)
        taken = {key for module in fused for key, _ in module.keys.values()}
        self._sources = {name: _Source(name) for name in names if name not in taken}
        others = [name for name, m in matches.items() if m["b"] and name not in taken]
        blocks = _have_blocks(handle, [m for m in fused if len(m.names) > 1], others)
        for module in fused:
            self._add(module, blocks and len(module.names) > 1)

    def _add(self, module: _Fused, blocks: bool) -> None:
        """Takes in the parts of a fused module, of a block-diagonal one those that it has."""
        count = len(module.names)
        has = [True] * count
        if blocks and "m" not in module.keys:  # which a part has of its own, whatever it adds
            has = [x.any() for x in np.split(self._handle.get_tensor(module.keys["a"][0]), count)]
        for kind, (key, suffix) in module.keys.items():
            meant = {i: name + suffix for i, name in enumerate(module.names)
                     if has[i] or not any(has)}
            if doubled := [part for part in meant.values() if part in self._sources]:
                self.problems.append(
                    f"{key}: stands for the same weight as {self._sources[doubled[0]].key}"
                )
                continue
            for i, part in meant.items():
                # Else of what lora_A reads, of alpha and of a LoKr's factors all have the same.
                self._sources[part] = _Source(
                    key,
                    rows=(i, count) if kind in ("b", "m") or (blocks and kind == "a") else (0, 1),
                    columns=(i, count) if blocks and kind == "b" else (0, 1),
                    shares=count if blocks and kind == "alpha" else 1,
                    part=(i, count),
                )

    def keys(self) -> list[str]:
        return list(self._sources)

    def metadata(self) -> dict[str, str] | None:
        return self._handle.metadata()

    def get_slice(self, key: str) -> Any:
        source = self._sources[key]
        return _Part(self._handle.get_slice(source.key), source)

    def get_tensor(self, key: str) -> np.ndarray:
        source = self._sources[key]
        return source.of(self._handle.get_tensor(source.key))

    def part(self, key: str) -> tuple[int, int]:
        """(index, count): of which of equal parts of a module's rows a tensor is."""
        return self._sources[key].part


def _fused(matches: dict[str, re.Match], modules: Modules) -> list[_Fused]:
    """The modules of a file that have other names in diffusers' layout."""
    found: dict[tuple[str, str], _Fused] = {}
    for joined in (False, True):
        of_kind = {n: m for n, m in matches.items() if is_underscored(m) == joined}
        wanted = sorted({m["module"] for m in of_kind.values()})
        for i, (module, diffusers) in enumerate(modules.makers):
            template = module.replace(".", "_") if joined else module
            slots = resolve([rule(template, str(i))], wanted)[0]
            for name, m in of_kind.items():
                if (slot := slots.get(m["module"])) is None:
                    continue
                filled = (d.replace("{layer}", str(slot.layer)) for d in diffusers)
                names = tuple(
                    m["prefix"] + (d.replace(".", "_") if joined else d) for d in filled
                )
                fused = found.setdefault((m["prefix"], m["module"]), _Fused(names, {}))
                fused.keys[m.lastgroup] = name, name[m.end("module"):]
    return list(found.values())


def _have_blocks(handle: Any, fused: list[_Fused], others: list[str]) -> bool:
    """Whether every fused module is block-diagonal, with the ranks of the other modules."""
    ranks = {tuple(handle.get_slice(name).get_shape())[1:] for name in others}
    nonzero = False
    for module in fused:
        if not {"a", "b"} <= module.keys.keys():
            return False
        count, shape = len(module.names), handle.get_slice(module.keys["b"][0]).get_shape()
        if len(shape) != 2 or any(size % count for size in shape) or (
            ranks and ranks != {(shape[1] // count,)}
        ):
            return False
        whole = handle.get_tensor(module.keys["b"][0])
        for i, rows in enumerate(np.split(whole, count)):
            parts = np.split(rows, count, 1)
            if any(part.any() for j, part in enumerate(parts) if j != i):
                return False
            nonzero = nonzero or parts[i].any()
    # A lora_B of zeros alone could be either.
    return bool(fused) and bool(ranks or nonzero)
