"""A LoRA by what a user names it with: a run's directory, a file of any format, or a tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dopsd_jax.core import mirror, trees
from dopsd_jax.core.checks import is_number
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.pipeline import Pipeline, transformer_shapes


def read_lora(path: str | Path, pipe: Pipeline) -> tuple[Any, float]:
    """A LoRA from a run's directory or from a file of any format: (tree, alpha / rank)."""
    path = mirror.local_copy(path)
    shapes = transformer_shapes(pipe.denoiser.network)
    if workdir_lib.is_workdir(path):
        tree, spec = workdir_lib.read_lora(path)
        workdir_lib.check_fits(tree, shapes, path)
    else:
        tree, spec = lora_files.read_lora(path, pipe.lora.modules, shapes)
    return tree, spec.scale


def take_lora(lora: Any, pipe: Pipeline) -> tuple[Any, float]:
    """A LoRA as `generate` takes it: (tree, alpha / rank).

    Raises:
        ValueError: Neither a path nor such a pair, or one of another model.
    """
    if isinstance(lora, str | Path):
        return read_lora(lora, pipe)
    if not isinstance(lora, tuple) or len(lora) != 2 or not is_number(lora[1]):
        raise ValueError(f"lora: expected a path or (tree, alpha / rank), got {lora!r:.60}")
    tree, scale = lora
    flat = trees.flatten(tree) if isinstance(tree, Mapping) else {}
    names = {name.rpartition("/")[0] for name in flat}
    if not names or flat.keys() != {f"{n}/{part}" for n in names for part in "ab"} or not all(
        hasattr(leaf, "shape") for leaf in flat.values()
    ):
        raise ValueError(
            "lora: expected a tree of pairs of arrays a and b, as weights.read_lora gives it, got "
            f"{tree!r:.60}"
        )
    workdir_lib.check_fits(tree, transformer_shapes(pipe.denoiser.network), "lora")
    return tree, scale
