"""A LoRA in memory as the tensors of torch's modules, by which files keep it; see lora_files.py."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from dopsd_jax.core import trees
from dopsd_jax.models import adapters
from dopsd_jax.weights.lora_checks import stack_of
from dopsd_jax.weights.lora_reader import LoraSpec, raise_all
from dopsd_jax.weights.names import Modules, Rule, resolve, rule

Parts = dict[str, dict[str, np.ndarray]]  # module path -> leaf by its name -> tensor

# What torch calls the leaves, which are transposed there.
TORCH_NAMES = {
    "a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector",
    "w1": "lokr_w1", "w2": "lokr_w2", "w2_up": "lokr_w2_a", "w2_down": "lokr_w2_b",
}
SCALED = ("b", "w2_up")  # where alpha / rank stands
KINDS = (set(adapters.LORA), set(adapters.DORA), {"w1", "w2"}, {"w1", "w2_down", "w2_up"})


def torch_parts(
    where: str | Path, lora: trees.Tree, spec: LoraSpec, modules: list[Rule]
) -> Parts:
    """The tree by torch's modules, {module path: leaves}, each transposed, contiguous float32."""
    templates = {r.target: r.template for r in modules if r.target is not None}
    problems: list[str] = []
    found: dict[str, dict[str, np.ndarray]] = {}
    for target, leaves in adapters.sites(lora).items():
        for part, leaf in leaves.items():
            if target not in templates or part not in TORCH_NAMES:
                problems.append(
                    f"{target}/{part}: no a or b of a module this network's LoRA files can name"
                )
                continue
            found.setdefault(target, {})[part] = np.asarray(leaf).astype(np.float32, copy=False)
    if not found and not problems:
        problems.append("the LoRA is empty")
    if len({"w1" in leaves for leaves in found.values()}) > 1:
        problems.append("expected one kind of adapter, got LoRA and LoKr")
    parts, layers = {}, defaultdict(set)
    for target, leaves in found.items():
        stacked = "{layer}" in templates[target]
        if wrong := _break_leaves(leaves, spec, stacked):
            problems.append(f"{target}: {wrong}")
            continue
        if not all(np.isfinite(x).all() for x in leaves.values()):
            problems.append(f"{target}: holds NaN or infinity; export an earlier checkpoint")
        count = len(next(iter(leaves.values())))
        if stacked:
            layers[stack_of(templates[target])].add(count)
        for layer in range(count) if stacked else [None]:
            module = templates[target].format(layer=layer)
            parts[module] = {
                part: np.ascontiguousarray((x if layer is None else x[layer]).T)
                for part, x in leaves.items()
            }
    problems += [
        f"{stack}: expected one number of layers, got {sorted(lengths)}"
        for stack, lengths in layers.items() if len(lengths) > 1
    ]
    raise_all(where, problems)
    return parts


def _break_leaves(leaves: dict[str, np.ndarray], spec: LoraSpec, stacked: bool) -> str:
    """What is wrong with the leaves of one linear, or of a stack of them; "" for nothing."""
    if set(leaves) not in KINDS:
        return f"expected a and b, got only {', '.join(leaves)}"
    shapes = {part: x.shape for part, x in leaves.items()}
    if len({shape[:stacked] for shape in shapes.values()}) > 1:
        pass
    elif "w1" in leaves:
        low, up = shapes.get("w2_down"), shapes.get("w2_up")
        if low is None or (low[-1], up[-2]) == (spec.rank, spec.rank):
            return ""
    elif (shapes["a"][-1], shapes["b"][-2]) == (spec.rank, spec.rank) and all(
        len(shapes[part]) == 2 + stacked for part in "ab"
    ) and shapes.get("m", shapes["b"])[-1] == shapes["b"][-1]:
        return ""
    axis = "layers, " if stacked else ""
    if "w1" in leaves:
        return f"expected factors of rank {spec.rank}, got {shapes}"
    lengths = f" and m [{axis}out]" if "m" in leaves else ""
    return (
        f"expected a [{axis}in, {spec.rank}] and b [{axis}{spec.rank}, out]{lengths}, got "
        + " and ".join(map(str, shapes.values()))
    )


def named(parts: Parts, prefix: str, baked: LoraSpec | None) -> dict[str, np.ndarray]:
    """The tensors by their names in a file.

    Args:
        parts: From `torch_parts`.
        prefix: Of every name.
        baked: Whose alpha / rank to multiply in; None where it stands elsewhere.
    """
    tensors = {}
    for module, leaves in parts.items():
        for part, x in leaves.items():
            if baked is not None and part in SCALED:
                x = (x.astype(np.float64) * baked.scale).astype(np.float32)
            tensors[f"{prefix}{module}.{TORCH_NAMES[part]}"] = x
    return tensors


def fused_pairs(
    where: str | Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]], modules: Modules
) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Module path of the makers -> (A, B) of each of its parts, in order; zeros where it has none.
    """
    table = [rule(part, f"{i}/{j}") for i, (_, parts) in enumerate(modules.makers)
             for j, part in enumerate(parts)]
    slots, _ = resolve(table, pairs)
    reordered, _ = resolve([rule(m, "x") for m in modules.reordered], pairs)
    problems = [f"{m}: has its rows in another order there; use the format comfyui"
                for m in reordered]
    found: dict[str, list] = {}
    for module, pair in pairs.items():
        if module not in slots:  # of the same name in both layouts
            found[module] = [pair]
            continue
        i, j = map(int, slots[module].name.split("/"))
        template, parts = modules.makers[i]
        name = template.replace("{layer}", str(slots[module].layer))
        found.setdefault(name, [None] * len(parts))[j] = pair
    raise_all(where, problems)
    for given in found.values():
        nothing = next(tuple(map(np.zeros_like, pair)) for pair in given if pair is not None)
        given[:] = [nothing if pair is None else pair for pair in given]
    return found
