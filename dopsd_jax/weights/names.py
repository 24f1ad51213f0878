"""Name tables: which tensor of a file is which parameter of a network, in both directions.

A table is a list of rules. Every tensor name must match exactly one rule and every parameter must
be filled exactly once; all violations are collected and raised together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np


class WeightsError(ValueError):
    """Weights that do not fit: names, shapes, files."""


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse, on NumPy arrays (views where possible)."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.T, lambda x: x.T)  # (out, in) <-> (in, out)
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


@dataclass(frozen=True)
class Rule:
    """One family of tensor names.

    Attributes:
        pattern: Regex that must match the whole tensor name. A group named `layer`, if present,
            is the index on the leading axis of a stacked parameter; other groups may be used in
            `target` as {name}.
        target: Slash-joined parameter name, or None for a tensor deliberately left unused.
        transform: Layout change of one tensor (one layer of a stacked parameter).
        template: The tensor name as a format string with {layer} and the pattern's other groups,
            where the pattern is not simply the escaped template (see `rule`).
    """

    pattern: str
    target: str | None
    transform: Transform = SAME
    template: str = ""


def rule(template: str, target: str | None, transform: Transform = SAME, **groups: str) -> Rule:
    """Rule from a readable template: `layers.{layer}.attention.{p}.weight`.

    Args:
        template: Tensor name; {layer} matches digits, every other {group} its regex in `groups`.
        target: Parameter name, may use the groups.
        transform: Layout change.
        **groups: Regex of each group but `layer`.
    """
    parts = re.split(r"\{(\w+)\}", template)
    pattern = "".join(
        re.escape(part) if i % 2 == 0 else f"(?P<{part}>{groups.get(part, '[0-9]+')})"
        for i, part in enumerate(parts)
    )
    return Rule(pattern, target, transform, template)


@dataclass(frozen=True)
class Slot:
    """Where one tensor goes: parameter name, index on the stacked axis or None, layout change."""

    name: str
    layer: int | None
    transform: Transform


def resolve(table: Iterable[Rule], tensor_names: Iterable[str]) -> tuple[dict[str, Slot], list]:
    """Matches every tensor name with its rule.

    Returns:
        Slots by tensor name (without the deliberately unused), and the list of problems: names
        that match no rule or more than one.
    """
    table = [(re.compile(r.pattern), r) for r in table]
    slots, problems = {}, []
    for tensor in tensor_names:
        matches = [(m, r) for p, r in table if (m := p.fullmatch(tensor))]
        if len(matches) != 1:
            rules = ", ".join(r.pattern for _, r in matches) or "none"
            problems.append(f"{tensor}: expected exactly one rule of the table, matched {rules}")
            continue
        match, found = matches[0]
        if found.target is not None:
            groups = match.groupdict()
            layer = groups.pop("layer", None)
            slots[tensor] = Slot(
                found.target.format(**groups), None if layer is None else int(layer),
                found.transform,
            )
    return slots, problems


def export_names(
    table: Iterable[Rule], tensor_names: Iterable[str], flat: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The other direction: the tensors called `tensor_names`, taken from a flat parameter dict."""
    slots, problems = resolve(table, tensor_names)
    if problems:
        raise WeightsError("\n".join(problems))
    tensors = {}
    for tensor, slot in slots.items():
        value = np.asarray(flat[slot.name])
        tensors[tensor] = slot.transform.to_torch(
            value if slot.layer is None else value[slot.layer]
        )
    return tensors
