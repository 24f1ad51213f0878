"""Name tables: which tensor of a file is which parameter of a network, in both directions.

A table is a list of rules. Every tensor name must match exactly one rule and every parameter must
be filled exactly once; all violations are collected and raised together.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
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
# Rows in two halves, one of which each layout writes first.
LINEAR_SWAPPED = Transform(
    lambda x: np.roll(x, len(x) // 2, 0).T, lambda x: np.roll(x.T, x.shape[1] // 2, 0)
)
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
        parts: Of a tensor that is several parameters, one after the other along its rows: the
            values of the group `part`. The names it is resolved by are `tensor#part`.
    """

    pattern: str
    target: str | None
    transform: Transform = SAME
    template: str = ""
    parts: tuple[str, ...] = ()


PART = "#"


def rule(template: str, target: str | None, transform: Transform = SAME, **groups: str) -> Rule:
    """Rule from a readable template: `layers.{layer}.attention.{p}.weight`.

    Args:
        template: Tensor name; {layer} matches digits, every other {group} its regex in `groups`.
            One that ends in `#{part}` is of a fused tensor, whose parts `groups` lists: "q|k|v".
        target: Parameter name, may use the groups.
        transform: Layout change.
        **groups: Regex of each group but `layer`.
    """
    parts = re.split(r"\{(\w+)\}", template)
    pattern = "".join(
        re.escape(part) if i % 2 == 0 else f"(?P<{part}>{groups.get(part, '[0-9]+')})"
        for i, part in enumerate(parts)
    )
    fused = template.endswith(f"{PART}{{part}}")
    return Rule(
        pattern, target, transform, template, tuple(groups["part"].split("|")) if fused else ()
    )


def fused_parts(table: Iterable[Rule], tensor_names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Of every fused tensor, {tensor: names of its parts} as `resolve` takes them."""
    fused = [(re.compile(r.pattern.rpartition(re.escape(PART))[0]), r) for r in table if r.parts]
    return {
        tensor: tuple(f"{tensor}{PART}{part}" for part in r.parts)
        for tensor in tensor_names for pattern, r in fused if pattern.fullmatch(tensor)
    }


@dataclass(frozen=True)
class Modules:
    """Every Linear of a network by its module path in torch, as LoRA files name it.

    Attributes:
        rules: Module path <-> tree path. {layer} is the only group they use, so that they can be
            read in both directions.
        comfyui: What ComfyUI expects before a module path of diffusers' layout.
        makers: Module paths of its makers' own layout, where they are other ones, each with those
            that its rows stand for, in order.
        reordered: Module paths of diffusers' layout whose rows the makers have in another order.
    """

    rules: tuple[Rule, ...]
    comfyui: str
    makers: tuple[tuple[str, tuple[str, ...]], ...] = ()
    reordered: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)


def _expanded(r: Rule) -> Iterator[tuple[str, str]]:
    """(tensor, target) of a rule for each choice of its groups; {layer} stays as it is."""
    groups = re.findall(r"\(\?P<(\w+)>([^)]*)\)", r.pattern)
    chosen = [(g, ["{layer}"] if g == "layer" else values.split("|")) for g, values in groups]
    for values in itertools.product(*(choices for _, choices in chosen)):
        filled = dict(zip((g for g, _ in chosen), values, strict=True))
        yield r.template.format(**filled), r.target.format(**filled)


def linear_modules(
    table: Iterable[Rule], comfyui: str, *, idle: Iterable[str] = (),
    makers: Iterable[Rule] = (),
) -> Modules:
    """Every Linear of a network, from its name table: the rules that fill a kernel.

    Args:
        table: Its rules are of `rule`; a group other than {layer} lists its values, "q|k|v".
        comfyui: See `Modules`.
        idle: Templates of modules that hold no weights (activations, lists of modules) and whose
            path may end like that of a Linear. PEFT refuses a target that also matches such a
            module, so the writer of PEFT files has to know them.
        makers: Rules of the makers' own layout, where "#part" ends the name of a part of a tensor;
            those that reorder rows are left out.
    """
    found = _linears(table)
    of_target = {target: module for module, target in found}
    parts: dict[str, list[str]] = {}
    makers = list(makers)
    for module, target in _linears(r for r in makers if r.transform == LINEAR):
        parts.setdefault(module.partition(".weight#")[0], []).append(of_target[target])
    others = tuple((m, tuple(p)) for m, p in parts.items() if (m, *p) != (m, m))
    reordered = tuple(
        of_target[target] for _, target in _linears(r for r in makers if r.transform != LINEAR)
    )
    found.sort(key=lambda pair: "{layer}" not in pair[0])  # those of blocks come first
    return Modules(
        (*(rule(*pair) for pair in found), *(rule(m, None) for m in idle)), comfyui, others,
        reordered,
    )


def _linears(table: Iterable[Rule]) -> list[tuple[str, str]]:
    """(module path, tree path) of every rule that fills a kernel."""
    return [
        (module.removesuffix(".weight"), target.removesuffix("/kernel"))
        for r in table if r.target is not None and r.target.endswith("/kernel")
        for module, target in _expanded(r)
    ]


def stacks_of(table: Iterable[Rule]) -> tuple[str, ...]:
    """Names of the stacks of layers in a network's parameters, from its name table."""
    names = (
        target for r in table if r.target is not None and "(?P<layer>" in r.pattern
        for _, target in _expanded(r)
    )
    return tuple(dict.fromkeys(name.partition("/")[0] for name in names))


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


def tensor_names(table: Iterable[Rule], flat: dict[str, np.ndarray]) -> dict[str, Slot]:
    """Every tensor of a table that a flat parameter dict fills, in the table's order.

    Raises:
        WeightsError: Parameters that the table lacks, and rules whose parameter is not there.
    """
    slots: dict[str, Slot] = {}
    problems = []
    for r in table:
        for tensor, target in _expanded(r) if r.target is not None else ():
            if target not in flat:
                problems.append(f"{target}: the tree has no such parameter")
                continue
            layers = range(len(flat[target])) if "{layer}" in tensor else [None]
            slots |= {tensor.format(layer=i): Slot(target, i, r.transform) for i in layers}
    named = {slot.name for slot in slots.values()}
    problems += [f"{name}: no tensor holds it" for name in flat if name not in named]
    if problems:
        raise WeightsError("\n  ".join(problems))
    return slots


def export_names(
    table: Iterable[Rule], tensor_names: Iterable[str], flat: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The other direction: the tensors called `tensor_names`, taken from a flat parameter dict."""
    table, tensor_names = list(table), list(tensor_names)
    fused = fused_parts(table, tensor_names)
    names = [part for tensor in tensor_names for part in fused.get(tensor, (tensor,))]
    slots, problems = resolve(table, names)
    if problems:
        raise WeightsError("\n".join(problems))
    tensors = {}
    for tensor, slot in slots.items():
        value = np.asarray(flat[slot.name])
        tensors[tensor] = slot.transform.to_torch(
            value if slot.layer is None else value[slot.layer]
        )
    for tensor, parts in fused.items():
        tensors[tensor] = np.concatenate([tensors.pop(part) for part in parts])
    return tensors
