"""Writes trained parameters back into the files they came from, names and layout unchanged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from dopsd_jax.core import trees
from dopsd_jax.core.files import new_sibling
from dopsd_jax.weights.load import weight_files
from dopsd_jax.weights.names import Rule, WeightsError, resolve, tensor_names


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


SHARD_BYTES = 5 * 10**9  # of one file, as diffusers writes them
STEM = "diffusion_pytorch_model"
CARD = ("README.md", "images")  # a model card and its pictures, beside weights; see run/card.py
MADE_BY = {"format": "pt", "made_by": "dopsd_jax"}


def write_component(
    out: str | Path, config: str | Path, table: Iterable[Rule], tree: trees.Tree, *,
    dtypes: Mapping[tuple[str, int | None], np.dtype] | None = None, overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes a transformer as diffusers does: config.json, shards of safetensors, their index.

    Args:
        out: The directory; made, or replaced if it was written here.
        config: Its config.json, which is copied.
        table: The network's name table in the layout that is written.
        tree: Parameters as the network has them, NumPy.
        dtypes: By (parameter, layer or None), see `load.kept_dtypes`; None: those of the tree.
        overwrite: Replace a directory of another origin too.
        shard_bytes: Of one file.

    Returns:
        The files of tensors.

    Raises:
        WeightsError: Names that do not fit, or a directory that may not be replaced; nothing is
            written then.
    """
    out, flat = Path(out), {name: np.asarray(x) for name, x in trees.flatten(tree).items()}
    _check_replaceable(out, overwrite)
    slots = tensor_names(table, flat)

    def dtype(name: str) -> np.dtype:
        slot = slots[name]
        return flat[slot.name].dtype if dtypes is None else dtypes[slot.name, slot.layer]

    def size(name: str) -> int:
        slot, value = slots[name], flat[slots[name].name]
        whole = value.size if slot.layer is None else value[0].size
        return whole * dtype(name).itemsize

    def tensor(name: str) -> np.ndarray:
        slot, value = slots[name], flat[slots[name].name]
        value = slot.transform.to_torch(value if slot.layer is None else value[slot.layer])
        return np.ascontiguousarray(value, dtype(name))

    with new_sibling(out) as temporary:
        temporary.mkdir()
        sizes = {name: size(name) for name in slots}
        groups = _shards_of(sizes, shard_bytes)
        names = [f"{STEM}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        if len(groups) == 1:
            names = [f"{STEM}.safetensors"]
        for file, group in zip(names, groups, strict=True):  # one shard in memory at a time
            save_file({n: tensor(n) for n in group}, temporary / file, metadata=MADE_BY)
        if len(groups) > 1:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {
                    n: f for f, group in zip(names, groups, strict=True) for n in group
                },
            }
            (temporary / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2))
        shutil.copyfile(config, temporary / "config.json")
        carry_card(out, temporary)
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    return [out / name for name in names]


def carry_card(old: Path, new: Path) -> None:
    """Takes a model card into the directory that is about to replace its own; it may be edited."""
    readme, pictures = (old / name for name in CARD)
    if readme.is_file():
        shutil.copyfile(readme, new / readme.name)
    if pictures.is_dir():
        shutil.copytree(pictures, new / pictures.name)


def _shards_of(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Tensor names in order, cut so that no group but one of a single tensor is larger."""
    groups, size = [[]], 0
    for name, num_bytes in sizes.items():
        if groups[-1] and size + num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    return groups


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise WeightsError(f"{out}: expected a directory, found a file")
    others = sorted(
        p.name for p in out.iterdir()
        if p.name not in ("config.json", f"{STEM}.safetensors.index.json", *CARD)
        and not (p.name.startswith(STEM) and p.suffix == ".safetensors")
    )
    if others:  # not even with --overwrite: these are no weights
        raise WeightsError(f"{out}: holds {', '.join(others[:5])}; choose a new directory")
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as f:
            ours = (f.metadata() or {}).get("made_by") == MADE_BY["made_by"]
        if not ours and not overwrite:
            raise WeightsError(
                f"{out}: holds weights that were not written here; --overwrite replaces them"
            )


def read_tensors(file: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file."""
    with safe_open(file, framework="numpy") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def write_tensors(
    directory: str | Path, contents: dict[Path, dict[str, np.ndarray]]
) -> None:
    """Writes all safetensors files of a folder, each atomically, and the index beside them."""
    for file, tensors in contents.items():
        with new_sibling(file) as temporary:
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
