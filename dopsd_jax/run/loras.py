"""LoRAs by what a user names them with: a run's directory, a file of any format, or a tree.

Several add up, each with a strength: `runs/a`, `b.safetensors:0.7`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.core import files, mirror, trees
from dopsd_jax.core.checks import is_number, noted
from dopsd_jax.core.trees import Tree
from dopsd_jax.method import dora
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.models import adapters
from dopsd_jax.models.quantization import AS_DTYPE
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights import lora_files, lora_reader
from dopsd_jax.weights.pipeline import Pipeline
from dopsd_jax.weights.shapes import transformer_shapes

# How a task goes on from those before it -> whether a LoRA or all weights train.
CARRIES = {"adapter": "lora", "stack": "lora", "full": "full"}


class Named(NamedTuple):
    """A LoRA on disk and how strongly it counts; 1 is as it was trained."""

    path: str
    strength: float = 1.0


def parse(text: str) -> Named:
    """"PATH" or "PATH:STRENGTH" as a user writes it.

    Raises:
        ValueError: A strength that is no finite number, or no path.
    """
    path, colon, strength = text.rpartition(":")
    # A colon may belong to the path: gs://bucket/run, C:\\runs, or a name that exists as it is.
    if not colon or "/" in strength or "\\" in strength or os.path.exists(text):
        path, strength = text, "1"
    if not path:
        raise ValueError(f"expected PATH or PATH:STRENGTH of a LoRA, got {text!r}")
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{text}: expected PATH or PATH:STRENGTH with a number such as 0.7 for the strength, "
            f"got {strength!r}"
        )
    return Named(path, value)


def parse_list(text: str) -> list[Named]:
    """"a,b.safetensors:0.7" as a config has it.

    Raises:
        ValueError: As `parse`, or nothing between commas.
    """
    return [parse(part) for part in files.split_paths(text)]


def fingerprint(text: str) -> str:
    """What identifies the LoRAs of a config: their contents and strengths, not where they lie.

    Raises:
        ValueError: As `parse_list` and for what cannot be read.
    """
    found = []
    for named in parse_list(text):
        path = mirror.local_copy(named.path)
        if workdir_lib.is_workdir(path):
            tree, spec = workdir_lib.read_lora(path)
            digest = hashlib.sha256(f"alpha / rank {spec.scale!r}".encode())
            for name, x in sorted(trees.flatten(tree).items()):
                digest.update(f"{name} {x.dtype} {x.shape}".encode() + np.asarray(x).tobytes())
            word = digest.hexdigest()
        else:
            word = lora_reader.fingerprint(path)
        found.append(word if named.strength == 1 else f"{word} x {named.strength!r}")
    return ", ".join(found)


def check_present(text: str) -> None:
    """Raises ValueError unless every LoRA of a config is there: a file, a folder or a run."""
    missing = [
        n.path for n in parse_list(text) if not mirror.is_remote(n.path) and
        not os.path.exists(n.path)
    ]
    if missing:
        raise ValueError(f"expected a LoRA file or a run's directory, found none at {missing[0]}")


def read_lora(path: str | Path, pipe: Pipeline) -> tuple[Tree, float]:
    """A LoRA from a run's directory or from a file of any format: (tree, alpha / rank)."""
    path = mirror.local_copy(path)
    shapes = transformer_shapes(pipe.denoiser.network)
    if workdir_lib.is_workdir(path):
        tree, spec = workdir_lib.read_lora(path)
        workdir_lib.check_fits(tree, shapes, path)
    else:
        tree, spec = lora_files.read_lora(path, pipe.lora.modules, shapes)
    return tree, spec.scale


def base_dtypes(paths: Sequence[str]) -> dict[str, str]:
    """LoRAs that were trained on quantised weights, and in which dtypes these were.

    By the run's config, and that of the run it went on from, or by the file's header; a file of
    another tool does not say.

    Args:
        paths: Of runs and files, local or not.

    Raises:
        ValueError: A file that cannot be read.
    """
    found = {name: ", ".join(sorted(_trained_in(mirror.local_copy(name)))) for name in paths}
    return {name: kinds for name, kinds in found.items() if kinds}


def _trained_in(path: str | Path) -> set[str]:
    """In which dtypes the weights were quantised that a LoRA was trained on; {} of floats."""
    if not workdir_lib.is_workdir(path):
        return {kind for kind in lora_reader.base_dtype(path).split(", ") if kind}
    config = workdir_lib.read_config(path)
    kinds = {config.get("base_dtype", AS_DTYPE)} - {AS_DTYPE}
    begun = config.get("init_lora") or ""
    for named in parse_list(begun) if begun else []:  # what it went on from, if it is still there
        if os.path.exists(named.path):
            kinds |= _trained_in(named.path)
    return kinds


def take_loras(
    lora: Any, pipe: Pipeline, *, any_rank: bool = False, params: Tree | None = None
) -> Tree:
    """LoRAs as `generate` takes them, as one: alpha / rank and strengths stand in its `b`.

    A strength s means the weights W + s (W' - W), also of a DoRA, as in ComfyUI.

    Args:
        lora: A path, a pair (tree, alpha / rank), or a list of such and of pairs of these with a
            strength.
        pipe: Of the model, with or without weights.
        any_rank: Let ranks add up to more than a linear has.
        params: The transformer's, where `pipe` has none. Without any, shapes come back in place of
            arrays where there is a DoRA.

    Raises:
        ValueError: Everything that is none of these, cannot be read, belongs to another model,
            stands twice in the list, adds up to more ranks than a linear has, or is a DoRA beside
            another adapter of the same layer, together.
    """
    taken = [_ready(tree, strength, pipe, params) for tree, strength in _members(lora, pipe)]
    if len(taken) == 1:
        return taken[0]
    tree = lora_lib.combined(taken)
    if not any_rank:
        _check_ranks(tree, taken)
    return tree


def take_trainable(lora: Any, pipe: Pipeline, *, any_rank: bool = False) -> Tree:
    """The same as it is trained and stored, with the `m` of a DoRA.

    Raises:
        ValueError: As `take_loras`; a DoRA of another strength than 1, which only weights can
            hold, or several of which one is no LoRA.
    """
    members = _members(lora, pipe)
    kinds = [adapters.kind_of(tree) for tree, _ in members]
    if set(kinds) <= {"lora"}:
        return take_loras(lora, pipe, any_rank=any_rank)
    strengths = [strength for _, strength in members]
    if len(members) > 1 or (kinds == ["dora"] and strengths != [1]):
        listed = ", ".join(
            f"{lora_lib.WORDS[k]} x {s:g}" for k, s in zip(kinds, strengths, strict=True)
        )
        raise ValueError(
            f"expected LoRAs, or one DoRA or LoKr by itself, a DoRA of strength 1, got {listed}; "
            "such a sum is no adapter of one kind, only weights can hold it (export --lora .. "
            "--full), and sample draws with it"
        )
    tree, strength = members[0]
    return tree if strength == 1 else lora_lib.weakened(tree, strength)


def _members(lora: Any, pipe: Pipeline) -> list[tuple[Tree, float]]:
    """(tree as it is stored, alpha / rank in it; strength) of each that was given."""
    members = lora if isinstance(lora, list) else [lora]
    if not members:
        raise ValueError("lora: expected a LoRA or a list of some, got an empty list")
    problems: list[str] = []
    taken: list[tuple[Tree, float]] = []
    for member in members:
        with noted(problems):
            taken.append(_take(member, pipe))
    named = [m[0] if isinstance(m, tuple) and m else m for m in members]
    paths = [os.path.realpath(x) for x in named if isinstance(x, str | Path)]
    problems += [f"{path}: given twice; give one of them, with the sum of their strengths"
                 for path in dict.fromkeys(p for p in paths if paths.count(p) > 1)]
    if problems:
        raise ValueError("\n  ".join(problems))
    return taken


def _ready(tree: Tree, strength: float, pipe: Pipeline, params: Tree | None) -> Tree:
    """The tree as the networks take it, of a strength."""
    def make(tree, params=None):
        tree = tree if params is None else dora.ready(tree, params)
        return tree if strength == 1 else lora_lib.weakened(tree, strength)

    if not dora.paths(tree):
        return make(tree)
    params = pipe.params if params is None else params
    if params is None:
        return jax.eval_shape(make, tree, transformer_shapes(pipe.denoiser.network))
    return jax.jit(make)(tree, params)


def stands_on(config: ConfigDict, pipe: Pipeline) -> tuple[Tree | None, Tree | None]:
    """What a run stands on, and what it goes on from, as `Step` takes them.

    Without weights only shapes come back of what it stands on, if there is a DoRA.

    Args:
        config: Its base_lora, init_lora and init_full, none of which need be there.
        pipe: Of the model, with or without weights.

    Raises:
        ValueError: As `take_loras`; a run that trained no full weights, or another model's.
    """
    earlier, start = (
        take(parse_list(config[key]), pipe) if config[key] else None
        for key, take in (("base_lora", take_loras), ("init_lora", take_trainable))
    )
    if config.init_full:
        start = workdir_lib.read_full(config.init_full)
        workdir_lib.check_same_model(
            start, transformer_shapes(pipe.denoiser.network), config.init_full
        )
    return earlier, start


def only_shapes(tree: Tree | None) -> bool:
    """Whether LoRAs are still to be read with the weights: what a DoRA changes depends on them."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _take(member: Any, pipe: Pipeline) -> tuple[Tree, float]:
    """One LoRA as it is stored, alpha / rank in its `b`, and its strength."""
    strength = 1.0
    if isinstance(member, tuple) and len(member) == 2 and isinstance(member[0], str | Path | tuple):
        member, strength = member
        if not is_number(strength):
            raise ValueError(f"{member}: expected a number for the strength, got {strength!r:.40}")
    if isinstance(member, str | Path):
        tree, scale = read_lora(member, pipe)
    else:
        tree, scale = _checked(member, pipe)
    if adapters.kind_of(tree) == "lora":  # in one product, as long as there is only `b` to scale
        return lora_lib.scaled(tree, strength * scale), 1.0
    return lora_lib.scaled(tree, scale), strength


def _checked(pair: Any, pipe: Pipeline) -> tuple[Tree, float]:
    """A pair (tree, alpha / rank) that fits the model."""
    if not isinstance(pair, tuple) or len(pair) != 2 or not is_number(pair[1]):
        raise ValueError(
            f"lora: expected a path, (path, strength) or (tree, alpha / rank), got {pair!r:.60}"
        )
    tree, scale = pair
    flat = trees.flatten(tree) if isinstance(tree, Mapping) else {}
    found = adapters.sites(tree) if flat else {}
    if not found or not all(hasattr(leaf, "shape") for leaf in flat.values()) or not all(
        {"a", "b"} <= leaves.keys() or adapters.lokrs(leaves) for leaves in found.values()
    ):
        raise ValueError(
            "lora: expected a tree of pairs of arrays a and b, or of another adapter's, as "
            f"weights.read_lora gives it, got {tree!r:.60}"
        )
    workdir_lib.check_fits(tree, transformer_shapes(pipe.denoiser.network), "lora")
    return tree, scale


def _check_ranks(tree: Tree, taken: Sequence[Tree]) -> None:
    """Raises ValueError where the ranks of several add up to more than a linear can use."""
    for path, a, b in lora_lib.pairs(tree):
        (fan_in, rank), fan_out = a.shape[-2:], b.shape[-1]
        if rank > min(fan_in, fan_out):
            name = f"{path}/a"
            ranks = [t[name].shape[-1] for t in map(trees.flatten, taken) if name in t]
            raise ValueError(
                f"lora: the ranks {' + '.join(map(str, ranks))} add up to {rank} at {path}, which "
                f"has {fan_in} inputs and {fan_out} outputs; reduce them first: export --lora .. "
                f"--rank {min(fan_in, fan_out)}"
            )
