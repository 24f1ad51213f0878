"""LoRA files on the layout of a network's makers, seen as if they were on diffusers'.

There the projections to q, k and v are one module, whose lora_B has the rows of all three, and
other modules have other names. A LoRA on such a module is three on the parts, with the same lora_A
each: what they add is exactly the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dopsd_jax.weights.names import Modules, resolve, rule

KOHYA = "lora_unet_"


@dataclass(frozen=True)
class _Source:
    """Where a tensor stands: part `index` of `count` equal parts of a tensor's rows."""

    key: str
    index: int = 0
    count: int = 1


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
        pattern: Takes a tensor's name apart: groups prefix, module, and a, b or alpha.
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
        return whole if source.count == 1 else _Rows(whole, source.count)

    def get_tensor(self, key: str) -> np.ndarray:
        source = self._sources[key]
        whole = self._handle.get_tensor(source.key)
        return np.split(whole, source.count)[source.index] if source.count > 1 else whole


def _sources(
    names: Iterable[str], pattern: re.Pattern, modules: Modules
) -> tuple[dict[str, _Source], list[str]]:
    """Name in diffusers' layout -> where it stands in the file, and which stand there twice."""
    names, problems = sorted(names), []
    matches = {name: m for name in names if (m := pattern.fullmatch(name))}
    found = {name: _Source(name) for name in names}
    parts: dict[tuple[bool, str], tuple[str, ...]] = {}
    for kohya in (False, True):
        wanted = {m["module"] for m in matches.values() if (m["prefix"] == KOHYA) == kohya}
        for i, (module, diffusers) in enumerate(modules.makers):
            template = module.replace(".", "_") if kohya else module
            for name, slot in resolve([rule(template, str(i))], sorted(wanted))[0].items():
                filled = (d.replace("{layer}", str(slot.layer)) for d in diffusers)
                parts[kohya, name] = tuple(
                    d.replace(".", "_") if kohya else d for d in filled
                )
    for name in names:
        match = matches.get(name)
        split = match and parts.get((match["prefix"] == KOHYA, match["module"]))
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
            found[part] = _Source(name, i, len(split) if match["b"] else 1)
    return found, problems
