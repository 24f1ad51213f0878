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

A DoRA has `X.lora_magnitude_vector` beside these. It has no ComfyUI file: there a row of the tuned
weight is divided by the length of the untuned one, so another picture would come of it. A LoKr has
`X.lokr_w1` and `X.lokr_w2`, or `X.lokr_w2_a` and `X.lokr_w2_b`, with alpha / rank in lokr_w2_a
unless ComfyUI reads it: PEFT would scale whole factors too. Neither has a file on the fused layout.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from dopsd_jax.core import trees
from dopsd_jax.core.files import fsync, new_sibling
from dopsd_jax.models import adapters
from dopsd_jax.weights import lokr_files
from dopsd_jax.weights.lora_parts import Parts, fused_pairs, named, torch_parts
from dopsd_jax.weights.lora_reader import (
    OUR_METADATA,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    LoraFileError,
    LoraSpec,
    read_lora,
)
from dopsd_jax.weights.mapped import open_safetensors
from dopsd_jax.weights.names import Modules, Rule, WeightsError, resolve
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
        lora: LoRA tree, leaves `a [(layers,) in, r]`, `b [(layers,) r, out]`, or a DoRA or LoKr,
            see models/adapters.py.
        spec: Rank, alpha and base model.
        modules: Module names of the network, from its name table.
        overwrite: Replace an adapter of another origin too; never anything else.
        about: More for the header of the file of tensors.

    Raises:
        LoraFileError: All that is wrong with the tree, or `path` holds something else.
    """
    path, modules = Path(path), list(modules)
    parts = torch_parts(path, lora, spec, modules)
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
    is_lokr = any("w1" in leaves for leaves in parts.values())
    targets = _target_modules(lora, parts, modules)
    config = _lokr_config(path, lora, spec) if is_lokr else _lora_config(lora, spec)
    config |= {
        "base_model_name_or_path": spec.base_model or None, "inference_mode": True,
        "target_modules": targets, "task_type": None,
    }
    tensors = named(parts, "base_model.model.", spec if is_lokr else None)
    ours = {**asdict(spec), "scale_in_b": True} if is_lokr else asdict(spec)
    with new_sibling(path) as temporary:
        temporary.mkdir(parents=True)
        # PEFT itself reads no metadata; it is how `check_replaceable` knows its own.
        _write(temporary / PEFT_WEIGHTS, tensors, ours, about)
        carry_card(path, temporary)
        (temporary / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for file in (PEFT_WEIGHTS, PEFT_CONFIG):
            fsync(temporary / file)
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
    fsync(path.parent)


def save_diffusers(
    path: str | Path, lora: trees.Tree, spec: LoraSpec, modules: Modules,
    *, overwrite: bool = False, about: Mapping[str, str] | None = None,
) -> None:
    """Writes one file for diffusers' `pipe.load_lora_weights`, with alpha / rank inside lora_B.

    Without alpha keys diffusers applies scale 1 to every family, and so does ComfyUI; `rank` and
    `alpha` go to a metadata entry that both ignore and `read_lora` undoes the scale by.

    Args:
        path: File, must end in .safetensors.
        lora: LoRA tree, leaves `a [(layers,) in, r]`, `b [(layers,) r, out]`, or a DoRA or LoKr,
            see models/adapters.py.
        spec: Rank, alpha and base model.
        modules: Module names of the network, from its name table.
        overwrite: Replace a file of another origin too.
        about: More for the file's header.

    Raises:
        LoraFileError: All that is wrong with the tree or the name, or a file of another origin.
    """
    parts = torch_parts(path, lora, spec, list(modules))
    if any("w1" in leaves for leaves in parts.values()):
        _factor_of(path, lora, spec)
    tensors = named(parts, "transformer.", spec)
    _save_one(path, tensors, {**asdict(spec), "scale_in_b": True}, overwrite, about)


def save_comfyui(
    path: str | Path, lora: trees.Tree, spec: LoraSpec, modules: Modules,
    *, overwrite: bool = False, about: Mapping[str, str] | None = None,
) -> None:
    """Writes one file for ComfyUI's LoRA loader, with an alpha beside every pair.

    diffusers reads it too for Z-Image; for FLUX.2 it must be given the file of `save_diffusers`.

    Args:
        path: File, must end in .safetensors.
        lora: LoRA tree, leaves `a [(layers,) in, r]`, `b [(layers,) r, out]`, or a DoRA or LoKr,
            see models/adapters.py.
        spec: Rank, alpha and base model.
        modules: Module names of the network, from its name table.
        overwrite: Replace a file of another origin too.
        about: More for the file's header.

    Raises:
        LoraFileError: All that is wrong with the tree or the name, or a file of another origin.
    """
    parts = torch_parts(path, lora, spec, list(modules))
    _refuse_dora(path, parts)
    tensors = named(parts, modules.comfyui, None)
    for module in parts:
        tensors[f"{modules.comfyui}{module}.alpha"] = np.asarray(spec.alpha, np.float32)
    _save_one(path, tensors, {**asdict(spec), "scale_in_b": False}, overwrite, about)


def _refuse_dora(path: str | Path, parts: Parts) -> None:
    if any("m" in leaves for leaves in parts.values()):
        raise LoraFileError(
            f"{path}: a DoRA has no ComfyUI file: ComfyUI divides by the lengths of the untuned "
            "weight's rows, others by those of the tuned one, so it would draw something else; "
            "write peft or diffusers, or the model with it (export --lora .. --full)"
        )


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
        LoraFileError: All that is wrong with the tree or the name, a file of another origin, a
            LoRA on a module whose rows have another order, or a DoRA or LoKr.
    """
    parts, tensors = torch_parts(path, lora, spec, list(modules)), {}
    _refuse_dora(path, parts)
    if any("w1" in leaves for leaves in parts.values()):
        raise LoraFileError(
            f"{path}: a LoKr has no file on the fused layout: three Kronecker products, one below "
            "the other, are none; use the format comfyui"
        )
    pairs_of = {module: (leaves["a"], leaves["b"]) for module, leaves in parts.items()}
    for module, pairs in fused_pairs(path, pairs_of, modules).items():
        key, count = f"diffusion_model.{module}", len(pairs)
        outs, ranks = (np.cumsum([0, *(b.shape[i] for _, b in pairs)]) for i in (0, 1))
        fused = np.zeros((outs[-1], ranks[-1]), np.float32)
        for i, (_, b) in enumerate(pairs):
            fused[outs[i] : outs[i + 1], ranks[i] : ranks[i + 1]] = b
        tensors[f"{key}.lora_A.weight"] = np.concatenate([a for a, _ in pairs])
        tensors[f"{key}.lora_B.weight"] = fused
        tensors[f"{key}.alpha"] = np.asarray(count * spec.alpha, np.float32)
    _save_one(path, tensors, {**asdict(spec), "scale_in_b": False}, overwrite, about)


FORMATS = {
    "peft": save_peft, "diffusers": save_diffusers, "comfyui": save_comfyui,
    "comfyui_fused": save_comfyui_fused,
}


def _lora_config(lora: trees.Tree, spec: LoraSpec) -> dict:
    """What PEFT's config of a LoRA or DoRA says of it."""
    is_dora = any("m" in leaves for leaves in adapters.sites(lora).values())
    return {
        "bias": "none", "init_lora_weights": True, "lora_dropout": 0.0, "peft_type": "LORA",
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "r": spec.rank,
    } | ({"use_dora": True} if is_dora else {})


def _lokr_config(where: Path, lora: trees.Tree, spec: LoraSpec) -> dict:
    """What PEFT's config of a LoKr says of it; its scale is 1, as it stands in the tensors."""
    return {
        "alpha": spec.rank, "decompose_both": False,
        "decompose_factor": _factor_of(where, lora, spec), "init_weights": True,
        "module_dropout": 0.0, "peft_type": "LOKR", "r": spec.rank, "rank_dropout": 0.0,
    }


def _factor_of(where: str | Path, lora: trees.Tree, spec: LoraSpec) -> int:
    """PEFT's decompose_factor, from which it and diffusers derive the shapes of all factors."""
    factor = lokr_files.decompose_factor(list(adapters.sites(lora).values()), spec.rank)
    if factor is None:
        raise LoraFileError(
            f"{where}: PEFT and diffusers derive the sizes of all factors from one factor and one "
            "rank, and this LoKr's follow from none; write comfyui, or the model with it (export "
            "--lora .. --full)"
        )
    return factor


def _target_modules(lora: trees.Tree, names: Iterable[str], modules: list[Rule]) -> list[str]:
    """PEFT's target_modules that hit exactly the modules called `names`.

    PEFT adapts every module that is called or ends in a target. So a suffix may stand for its
    modules only if every known module with that ending is in the LoRA; others are named in full.
    """
    paths = set(adapters.sites(lora))
    slots, _ = resolve(modules, names)
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
    with new_sibling(path) as temporary:
        _write(temporary, tensors, ours, about)
        fsync(temporary)
        os.replace(temporary, path)
    fsync(path.parent)


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
