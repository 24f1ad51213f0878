"""What is wrong with the shapes of a LoRA file's tensors: by themselves, and beside a network's."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping

from dopsd_jax.core import trees
from dopsd_jax.weights import lokr_files
from dopsd_jax.weights.lora_layouts import DiffusersView
from dopsd_jax.weights.lora_names import Keys
from dopsd_jax.weights.names import Rule


def stack_of(template: str) -> str:
    """The part of a module name template before its layer index."""
    return template.partition("{layer}")[0]


def key_of(parts: Mapping[str, str]) -> str:
    """The key of a module's first factor, which stands for the module in messages."""
    return next(parts[part] for part in ("a", *lokr_files.PARTS) if part in parts)


def check_dims(keys: Keys, dims: dict) -> tuple[dict, list[str]]:
    """The rank of every module, 0 without one, and what is wrong with the shapes by themselves."""
    problems, ranks, listed = [], {}, defaultdict(list)
    kinds = {"a" in parts for parts in keys.values()}
    if len(kinds) > 1:
        problems.append("expected one kind of adapter in all modules, got LoRA and LoKr; split the "
                        "file")
    for module, parts in keys.items():
        shapes, wrong = dims[module], ""
        first = key_of(parts)
        if "a" in parts:
            a, b = shapes["a"], shapes["b"]
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                wrong = f"{first}: expected (r, in) beside (out, r), got {a} beside {b}"
            ranks[module] = 0 if wrong else a[0]
        else:
            if lokr_files.sizes(shapes) is None:
                shown = ", ".join(f"{p} {shapes[p]}" for p in lokr_files.PARTS if p in shapes)
                wrong = (f"{first}: expected matrices (o1, i1) and (o2, i2), or their factors, got "
                         f"{shown}; a LoKr of convolutions is not read here")
            ranks[module] = 0 if wrong else lokr_files.rank_of(shapes)
        if wrong:
            problems.append(wrong)
        elif ranks[module]:
            listed[ranks[module]].append(first)
        if "m" in parts and not wrong and shapes["m"] not in ((b[0],), (b[0], 1)):
            problems.append(
                f"{parts['m']}: expected a length for every output, ({b[0]},) or ({b[0]}, 1), got "
                f"{shapes['m']}; lengths of inputs (LyCORIS wd_on_out=False) are not read here"
            )
        if "alpha" in parts and math.prod(shapes["alpha"]) != 1:
            problems.append(f"{parts['alpha']}: expected one number, got {shapes['alpha']}")
    if len(listed) > 1 and kinds != {True}:  # a smaller LoRA is one of more ranks, with zeros
        text = "; ".join(f"{r} in {len(n)}, first {n[0]}" for r, n in sorted(listed.items()))
        problems.append(f"expected one rank in all modules, got {text}; resize the LoKr to one")
    return ranks, problems


def _ends(
    parts: dict, shapes: dict, handle: DiffusersView, size_in: int, size_out: int
) -> tuple[int, int, str]:
    """(in, out) of a module's tensors, and what is wrong if they should be (size_in, size_out)."""
    if "a" in parts:
        a, b = shapes["a"], shapes["b"]
        return *a[-1:], *b[:1], (
            f"{parts['a']}: expected (r, {size_in}) and (out, r) = ({size_out}, r), got {a} "
            f"and {b}; is it of another model size?"
        )
    first = key_of(parts)
    count = handle.part(first)[1]
    (out_1, out_2), (in_1, in_2) = lokr_files.sizes(shapes) or ((0, 0), (0, 0))
    rows = out_1 * out_2
    return in_1 * in_2, rows // count if rows % count == 0 else 0, (
        f"{first}: expected factors of ({size_out * count}, {size_in}), got those of "
        f"({rows}, {in_1 * in_2}); is it of another model size?"
    )


def check_layers(
    keys: Keys, dims: dict, handle: DiffusersView, modules: list[Rule], shapes: trees.Tree | None
) -> tuple[dict[str, int], list[str]]:
    """Number of layers by tree path, and what does not fit the network or lacks layers."""
    stacks = {r.target: stack_of(r.template) for r in modules}
    params = trees.flatten(shapes) if shapes is not None else None
    problems, present, highest, doras = [], defaultdict(set), defaultdict(int), set()
    sizes: dict[str, set] = defaultdict(set)
    for (target, layer), parts in keys.items():
        own = {part: shape for part, shape in dims[target, layer].items() if part != "alpha"}
        if layer is not None:
            doras |= {target} if "m" in parts else set()
            present[target].add(layer)
            sizes[target].add(tuple(sorted(own.items())))
            highest[stacks[target]] = max(highest[stacks[target]], layer + 1)
        if params is None:
            continue
        first = key_of(parts)
        if f"{target}/kernel" not in params:
            problems.append(f"{first}: the network has no parameter {target}/kernel")
            continue
        *_, size_in, size_out = params[f"{target}/kernel"].shape
        *found, wrong = _ends(parts, own, handle, size_in, size_out)
        if found != [size_in, size_out]:
            problems.append(wrong)
    layers = {}
    for target, have in present.items():
        kernel = params.get(f"{target}/kernel") if params is not None else None
        layers[target] = count = highest[stacks[target]] if kernel is None else kernel.shape[0]
        if len(sizes[target]) > 1:
            problems += _break_stack(target, sizes[target], sized=kernel is not None)
        if max(have) >= count:
            problems.append(f"{target}: the network has {count} layers, the file one {max(have)}")
        if kernel is not None and target not in doras:
            continue  # the file changes nothing in layers that it lacks
        # A file may name any index, so the missing ones are not listed beyond the first few.
        if missing := list(itertools.islice((i for i in range(count) if i not in have), 10)):
            problems.append(
                f"{target}: expected all {count} layers, got {len(have)}, missing "
                f"{', '.join(map(str, missing))}{' ..' if len(missing) == 10 else ''}; a DoRA of "
                "some layers only is not read, nor any file of some without the network's shapes"
            )
    return layers, problems


def _break_stack(target: str, found: set, *, sized: bool) -> list[str]:
    """Problems of a stack whose layers have other tensors or shapes than each other.

    Args:
        target: Path of the linear.
        found: ((part, shape), ..) of its layers.
        sized: Whether each has been compared with the network, so that a LoRA's shapes are known.
    """
    kinds = sorted({", ".join(part for part, _ in layer) for layer in found})
    if len(kinds) > 1:
        return [f"{target}: expected the same tensors in all layers, got {' and '.join(kinds)}"]
    layers = [dict(layer) for layer in found]
    if "a" in layers[0]:
        ends = {(layer["a"][1:], layer["b"][:1]) for layer in layers}
        if sized or len(ends) == 1:
            return []  # ranks that differ are said of the whole file
        return [f"{target}: expected one shape in all layers, got {ends}"]
    return [f"{target}: expected the same factors in all layers, got {sorted(found)}"]
