"""LoRA files on the layout of a network's makers, seen as if they were on diffusers'.

There the projections to q, k and v are one module, whose lora_B has the rows of all three, and
other modules have other names. A LoRA on such a module is three on the parts, with the same lora_A
each: what they add is exactly the same. The factors of a LoKr are left whole, as only both together
say what the rows of a part are: see `lokr_files.leaves`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dopsd_jax.weights import lokr_files
from dopsd_jax.weights.lora_names import is_underscored
from dopsd_jax.weights.names import Modules, resolve, rule


@dataclass(frozen=True)
class _Source:
    """Where a tensor stands: for part `index` of `count` equal parts of a module's rows.

    Attributes:
        splits: Whether only these rows of the tensor count.
    """

    key: str
    index: int = 0
    count: int = 1
    splits: bool = True


class _Rows:
    """Shape and dtype of some of a tensor's rows, as safetensors' slices tell them."""

    def __init__(self, whole: Any, count: int):
        self._whole, self._count = whole, count

    def get_shape(self) -> list[int]:
        rows, *rest = self._whole.get_shape()
        # What cannot be split has no good shape, which whoever reads it compares with the network.
        return [rows // self._count if rows % self._count == 0 else 0, *rest]

    def get_dtype(self) -> str:
        return self._whole.get_dtype()


class DiffusersView:
    """An open safetensors file of a LoRA by the names of diffusers' layout.

    Args:
        handle: From `open_safetensors`.
        pattern: From `lora_names.key_pattern`.
        modules: Of the network.

    Attributes:
        problems: Tensors that stand for the same weight as another one.
    """

    def __init__(self, handle: Any, pattern: re.Pattern, modules: Modules):
        self._handle = handle
        self._sources, self.problems = _sources(handle.keys(), pattern, modules)

    def keys(self) -> list[str]:
        return list(self._sources)

    def metadata(self) -> dict[str, str] | None:
        return self._handle.metadata()

    def get_slice(self, key: str) -> Any:
        source = self._sources[key]
        whole = self._handle.get_slice(source.key)
        return _Rows(whole, source.count) if source.splits and source.count > 1 else whole

    def get_tensor(self, key: str) -> np.ndarray:
        source = self._sources[key]
        whole = self._handle.get_tensor(source.key)
        splits = source.splits and source.count > 1
        return np.split(whole, source.count)[source.index] if splits else whole

    def part(self, key: str) -> tuple[int, int]:
        """(index, count): of which of equal parts of a module's rows a tensor is."""
        return self._sources[key].index, self._sources[key].count


def _sources(
    names: Iterable[str], pattern: re.Pattern, modules: Modules
) -> tuple[dict[str, _Source], list[str]]:
    """Name in diffusers' layout -> where it stands in the file, and which stand there twice."""
    names, problems = sorted(names), []
    matches = {name: m for name in names if (m := pattern.fullmatch(name))}
    found = {name: _Source(name) for name in names}
    parts: dict[tuple[bool, str], tuple[str, ...]] = {}
    for joined in (False, True):
        wanted = {m["module"] for m in matches.values() if is_underscored(m) == joined}
        for i, (module, diffusers) in enumerate(modules.makers):
            template = module.replace(".", "_") if joined else module
            for name, slot in resolve([rule(template, str(i))], sorted(wanted))[0].items():
                filled = (d.replace("{layer}", str(slot.layer)) for d in diffusers)
                parts[joined, name] = tuple(
                    d.replace(".", "_") if joined else d for d in filled
                )
    for name in names:
        match = matches.get(name)
        split = match and parts.get((is_underscored(match), match["module"]))
        if not split:
            continue
        del found[name]
        suffix = name[match.end("module"):]
        meant = [f"{match['prefix']}{part}{suffix}" for part in split]
        if taken := [part for part in meant if part in found]:
            problems.append(f"{name}: stands for the same weight as {found[taken[0]].key}")
            continue
        for i, part in enumerate(meant):
            # Of what lora_A reads, and of alpha, all parts have the same.
            whole = match.lastgroup in lokr_files.PARTS
            count = len(split) if whole or match.lastgroup in ("b", "m") else 1
            found[part] = _Source(name, i, count, splits=not whole)
    return found, problems
