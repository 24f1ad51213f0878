"""Writes trained parameters back into the files they came from, names and layout unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from dopsd_jax.core import trees
from dopsd_jax.weights.load import weight_files
from dopsd_jax.weights.names import Rule, WeightsError, resolve


def replace_tensors(
    directory: str | Path, table: Iterable[Rule], tree: trees.Tree, dtype=None
) -> int:
    """Rewrites every safetensors file of a folder with the values of a parameter tree.

    Tensors that the table leaves unused keep their values. Each file is replaced atomically.

    Args:
        directory: A component's folder, such as transformer/.
        table: The component's name table.
        tree: Parameters as the network has them.
        dtype: Of all written tensors; None keeps that of the file.

    Returns:
        How many tensors were replaced.

    Raises:
        WeightsError: Names or shapes that do not fit; nothing is written then.
    """
    files = weight_files(Path(directory))
    flat = trees.flatten(tree)
    contents = {file: read_tensors(file) for file in files}
    slots, problems = resolve(table, [n for tensors in contents.values() for n in tensors])
    unknown = sorted({s.name for s in slots.values()} - set(flat))
    problems += [f"{name}: the tree has no such parameter" for name in unknown]
    missing = sorted(set(flat) - {s.name for s in slots.values()})
    problems += [f"{name}: no tensor of {directory} holds it" for name in missing]
    if problems:
        raise WeightsError(f"{directory}: " + "\n  ".join(problems))
    for tensors in contents.values():
        for name, old in tensors.items():
            value = old
            if name in slots:
                slot = slots[name]
                value = np.asarray(flat[slot.name])
                value = slot.transform.to_torch(
                    value if slot.layer is None else value[slot.layer]
                )
                if value.size != old.size:
                    raise WeightsError(
                        f"{directory}: {name}: expected {old.shape}, got {value.shape}"
                    )
            tensors[name] = np.ascontiguousarray(value.reshape(old.shape), dtype or old.dtype)
    write_tensors(directory, contents)
    return len(slots)


def read_tensors(file: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file."""
    with safe_open(file, framework="numpy") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def write_tensors(
    directory: str | Path, contents: dict[Path, dict[str, np.ndarray]]
) -> None:
    """Writes all safetensors files of a folder, each atomically, and the index beside them."""
    for file, tensors in contents.items():
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)
        os.replace(temporary, file)
    _update_index(Path(directory), contents)


def _update_index(directory: Path, contents: dict[Path, dict[str, np.ndarray]]) -> None:
    for index in directory.glob("*.safetensors.index.json"):
        values = json.loads(index.read_text())
        values["metadata"] = {
            "total_size": sum(t.nbytes for tensors in contents.values() for t in tensors.values())
        }
        index.write_text(json.dumps(values, indent=2) + "\n")
