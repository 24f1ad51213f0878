"""LoRA files of other tools, out and back in: PEFT directory, diffusers file, ComfyUI file.

In memory a LoRA mirrors the params tree. At the path of every adapted Linear stand `a [in, r]` and
`b [r, out]`, float32, with a leading axis of layers in a scanned stack; the Linear's output gains
alpha / rank (x a) b. Torch tools keep one transposed pair per layer, `lora_A (r, in)` and
`lora_B (out, r)`, and each has its own place for alpha:

    PEFT        base_model.model.X.lora_A.weight        alpha in adapter_config.json
    diffusers   transformer.X.lora_A.weight             alpha / rank multiplied into lora_B
    ComfyUI     diffusion_model.X.lora_A.weight         alpha in a scalar diffusion_model.X.alpha

X is the module path in diffusers' layout. ComfyUI maps it to its own fused layout while loading;
for FLUX.2 it knows such paths behind `transformer.` only, and skips others without an error. On the
fused layout itself X is a module path of the network's makers (`save_comfyui_fused`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from dopsd_jax.core import trees
from dopsd_jax.weights.lora_reader import (
    OUR_METADATA,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    LoraFileError,
    LoraSpec,
    raise_all,
    read_lora,
    stack_of,
)
from dopsd_jax.weights.mapped import open_safetensors
from dopsd_jax.weights.names import Modules, Rule, WeightsError, resolve, rule
from dopsd_jax.weights.save import CARD, carry_card

__all__ = [
    "FORMATS", "LoraFileError", "LoraSpec", "check_replaceable", "read_lora",
    "save_comfyui", "save_comfyui_fused", "save_diffusers", "save_peft",
]

HASH = "modelspec.hash_sha256"


def check_replaceable(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuses to replace a LoRA file or PEFT directory that was not written here.

    Args:
        path: Where a LoRA is about to be written.
        overwrite: Replace a LoRA of another origin too.

    Raises:
        LoraFileError: There is one, and `overwrite` does not allow to replace it.
    """
    path = Path(path)
    file = path / PEFT_WEIGHTS if path.is_dir() else path
    config = path / PEFT_CONFIG
    if overwrite or not (file.exists() or config.exists()):
        return
    try:
        with open_safetensors(file) as handle:
            ours = OUR_METADATA in (handle.metadata() or {})
    except (WeightsError, OSError):
        ours = False
    if not ours:
        raise LoraFileError(
            f"{path}: exists and was not written by dopsd_jax; choose another name, or pass "
            "--overwrite to replace it"
        )


def save_peft(
    path: str | Path, lora: trees.Tree, spec: LoraSpec, modules: Modules,
    *, overwrite: bool = False, about: Mapping[str, str] | None = None,
) -> None:
    """Writes a directory for `PeftModel.from_pretrained`; alpha stands in its config.

    Args:
        path: Directory, made if missing; an earlier adapter of ours there is replaced.
        lora: LoRA tree, leaves `a [(layers,) in, r]`, `b [(layers,) r, out]`.
        spec: Rank, alpha and base model.
        modules: Module names of the network, from its name table.
        overwrite: Replace an adapter of another origin too; never anything else.
        about: More for the header of the file of tensors.

    Raises:
        LoraFileError: All that is wrong with the tree, or `path` holds something else.
    """
    path, modules = Path(path), list(modules)
    pairs = _torch_pairs(path, lora, spec, modules)
    held = {p.name for p in path.iterdir()} if path.is_dir() else set()
    others = sorted(held - {PEFT_WEIGHTS, PEFT_CONFIG, *CARD})
    if path.suffix == ".safetensors":
        raise LoraFileError(f"{path}: expected the name of a directory, got one for a file")
    if others or (path.exists() and not path.is_dir()):
        what = f"a directory with {', '.join(others[:5])}" if others else "a file"
        raise LoraFileError(
            f"{path}: expected a new or empty directory or an earlier PEFT adapter, found "
            f"{what}; choose another name"
        )
    check_replaceable(path, overwrite=overwrite)
    config = {
        "base_model_name_or_path": spec.base_model or None,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": spec.rank,
        "target_modules": _target_modules(lora, pairs, modules),
        "task_type": None,
    }
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    with _new_sibling(path) as temporary:
        temporary.mkdir(parents=True)
        # PEFT itself reads no metadata; it is how `check_replaceable` knows its own.
        _write(temporary / PEFT_WEIGHTS, tensors, asdict(spec), about)
        carry_card(path, temporary)
        (temporary / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for file in (PEFT_WEIGHTS, PEFT_CONFIG):
            _fsync(temporary / file)
        if path.is_dir():
            # A directory cannot be replaced in one step: a crash between the two renames leaves
            # the earlier adapter whole, under this name.
            earlier = path.with_name(f".{path.name}.earlier")
            shutil.rmtree(earlier, ignore_errors=True)
            os.rename(path, earlier)
            os.rename(temporary, path)
            shutil.rmtree(earlier)
        else:
            os.rename(temporary, path)
    _fsync(path.parent)


def save_diffusers(
    path: str | Path, lora: trees.Tree, spec: LoraSpec, modules: Modules,
    *, overwrite: bool = False, about: Mapping[str, str] | None = None,
) -> None:
    """Writes one file for diffusers' `pipe.load_lora_weights`, with alpha / rank inside lora_B.

    Without alpha keys diffusers applies scale 1 to every family, and so does ComfyUI; `rank` and
    `alpha` go to a metadata entry that both ignore and `read_lora` undoes the scale by.

    Args:
        path: File, must end in .safetensors.
        lora: LoRA tree, leaves `a [(layers,) in, r]`, `b [(layers,) r, out]`.
        spec: Rank, alpha and base model.
        modules: Module names of the network, from its name table.
        overwrite: Replace a file of another origin too.
        about: More for the file's header.

    Raises:
        LoraFileError: All that is wrong with the tree or the name, or a file of another origin.
    """
    tensors = {}
    for module, (a, b) in _torch_pairs(path, lora, spec, list(modules)).items():
        tensors[f"transformer.{module}.lora_A.weight"] = a
        baked = (b.astype(np.float64) * spec.scale).astype(np.float32)
        tensors[f"transformer.{module}.lora_B.weight"] = baked
    _save_one(path, tensors, {**asdict(spec), "scale_in_b": True}, overwrite, about)


def save_comfyui(
    path: str | Path, lora: trees.Tree, spec: LoraSpec, modules: Modules,
    *, overwrite: bool = False, about: Mapping[str, str] | None = None,
) -> None:
    """Writes one file for ComfyUI's LoRA loader, with an alpha beside every pair.

    diffusers reads it too for Z-Image; for FLUX.2 it must be given the file of `save_diffusers`.

    Args:
        path: File, must end in .safetensors.
        lora: LoRA tree, leaves `a [(layers,) in, r]`, `b [(layers,) r, out]`.
        spec: Rank, alpha and base model.
        modules: Module names of the network, from its name table.
        overwrite: Replace a file of another origin too.
        about: More for the file's header.

    Raises:
        LoraFileError: All that is wrong with the tree or the name, or a file of another origin.
    """
    tensors = {}
    for module, (a, b) in _torch_pairs(path, lora, spec, list(modules)).items():
        key = f"{modules.comfyui}{module}"
        tensors[f"{key}.lora_A.weight"] = a
        tensors[f"{key}.lora_B.weight"] = b
        tensors[f"{key}.alpha"] = np.asarray(spec.alpha, np.float32)
    _save_one(path, tensors, {**asdict(spec), "scale_in_b": False}, overwrite, about)


def save_comfyui_fused(
    path: str | Path, lora: trees.Tree, spec: LoraSpec, modules: Modules,
    *, overwrite: bool = False, about: Mapping[str, str] | None = None,
) -> None:
    """Writes one file on the layout of the network's makers, for what knows no other.

    LoRAs on q, k and v, of rank r, become one of rank 3 r on their fused module: the lora_A one
    below the other, the lora_B in the blocks of a diagonal. What is added is exactly the same.

    Args:
        path: File, must end in .safetensors.
        lora: LoRA tree, leaves `a [(layers,) in, r]`, `b [(layers,) r, out]`.
        spec: Rank, alpha and base model.
        modules: Module names of the network, from its name table.
        overwrite: Replace a file of another origin too.
        about: More for the file's header.

    Raises:
        LoraFileError: All that is wrong with the tree or the name, a file of another origin, or a
            LoRA on a module whose rows have another order.
    """
    tensors = {}
    for module, pairs in _fused_pairs(
        path, _torch_pairs(path, lora, spec, list(modules)), modules
    ).items():
        key, count = f"diffusion_model.{module}", len(pairs)
        outs, ranks = (np.cumsum([0, *(b.shape[i] for _, b in pairs)]) for i in (0, 1))
        fused = np.zeros((outs[-1], ranks[-1]), np.float32)
        for i, (_, b) in enumerate(pairs):
            fused[outs[i] : outs[i + 1], ranks[i] : ranks[i + 1]] = b
        tensors[f"{key}.lora_A.weight"] = np.concatenate([a for a, _ in pairs])
        tensors[f"{key}.lora_B.weight"] = fused
        tensors[f"{key}.alpha"] = np.asarray(count * spec.alpha, np.float32)
    _save_one(path, tensors, {**asdict(spec), "scale_in_b": False}, overwrite, about)


def _fused_pairs(
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


FORMATS = {
    "peft": save_peft, "diffusers": save_diffusers, "comfyui": save_comfyui,
    "comfyui_fused": save_comfyui_fused,
}


def _torch_pairs(
    where: str | Path, lora: trees.Tree, spec: LoraSpec, modules: list[Rule]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The tree as torch names it, {module path: (A (r, in), B (out, r))}, contiguous float32."""
    templates = {r.target: r.template for r in modules if r.target is not None}
    problems: list[str] = []
    leaves: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name, leaf in trees.flatten(lora).items():
        target, _, part = name.rpartition("/")
        if target not in templates or part not in ("a", "b"):
            problems.append(f"{name}: no a or b of a module this network's LoRA files can name")
            continue
        leaves[target][part] = np.asarray(leaf).astype(np.float32, copy=False)
    if not leaves and not problems:
        problems.append("the LoRA is empty")
    pairs, layers = {}, defaultdict(set)
    for target, pair in leaves.items():
        if set(pair) != {"a", "b"}:
            problems.append(f"{target}: expected a and b, got only {', '.join(pair)}")
            continue
        a, b = pair["a"], pair["b"]
        stacked = "{layer}" in templates[target]
        fits = a.ndim == b.ndim == 2 + stacked and a.shape[:-2] == b.shape[:-2]
        if not fits or a.shape[-1] != spec.rank or b.shape[-2] != spec.rank:
            axis = "layers, " if stacked else ""
            problems.append(
                f"{target}: expected a [{axis}in, {spec.rank}] and b [{axis}{spec.rank}, out], "
                f"got {a.shape} and {b.shape}"
            )
            continue
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            problems.append(f"{target}: holds NaN or infinity; export an earlier checkpoint")
        if stacked:
            layers[stack_of(templates[target])].add(len(a))
        for layer in range(len(a)) if stacked else [None]:
            module = templates[target].format(layer=layer)
            pairs[module] = tuple(
                np.ascontiguousarray((x if layer is None else x[layer]).T) for x in (a, b)
            )
    problems += [
        f"{stack}: expected one number of layers, got {sorted(lengths)}"
        for stack, lengths in layers.items() if len(lengths) > 1
    ]
    raise_all(where, problems)
    return pairs


def _target_modules(lora: trees.Tree, pairs: Iterable[str], modules: list[Rule]) -> list[str]:
    """PEFT's target_modules that hit exactly the modules called `pairs`.

    PEFT adapts every module that is called or ends in a target. So a suffix may stand for its
    modules only if every known module with that ending is in the LoRA; others are named in full.
    """
    paths = {name.rpartition("/")[0] for name in trees.flatten(lora)}
    slots, _ = resolve(modules, pairs)
    templates = {r.target: r.template for r in modules}
    targets = set()
    for module, slot in slots.items():
        suffix = templates[slot.name].rpartition("{layer}.")[2]
        same_ending = [r.target for r in modules if f".{r.template}".endswith(f".{suffix}")]
        targets.add(suffix if paths.issuperset(same_ending) else module)
    return sorted(targets)


def _save_one(
    path: str | Path, tensors: dict[str, np.ndarray], ours: dict, overwrite: bool,
    about: Mapping[str, str] | None,
) -> None:
    path = Path(path)
    if path.suffix != ".safetensors" or path.is_dir():
        raise LoraFileError(
            f"{path}: expected the name of a file that ends in .safetensors, by which other tools "
            "find and open it"
        )
    check_replaceable(path, overwrite=overwrite)
    with _new_sibling(path) as temporary:
        _write(temporary, tensors, ours, about)
        _fsync(temporary)
        os.replace(temporary, path)
    _fsync(path.parent)


def _write(
    file: Path, tensors: dict[str, np.ndarray], ours: dict, about: Mapping[str, str] | None
) -> None:
    """A safetensors file whose bytes follow from its contents alone.

    The library writes the entries of `__metadata__` in another order each time, so the header is
    made here. With `about` it names the hash of all tensors, as Stability AI's model spec does.
    """
    content = memoryview(save(tensors))
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = {"format": "pt", OUR_METADATA: json.dumps(ours), **(about or {})}
    if about:
        metadata[HASH] = f"0x{hashlib.sha256(content[end:]).hexdigest()}"
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())),
                         **json.loads(bytes(content[8:end]))}).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.write(content[end:])


@contextlib.contextmanager
def _new_sibling(path: Path):
    """A temporary name on the same file system; nothing is left there on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)  # a killed process with the same id may have left one
    try:
        yield temporary
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
