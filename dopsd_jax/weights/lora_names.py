"""Names of tensors in LoRA files of other tools: which part of which linear layer each one is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

from dopsd_jax.weights import lokr_files
from dopsd_jax.weights.names import Modules, Slot, WeightsError, resolve, rule

PEFT_PREFIX = "base_model.model."
UNDERSCORED = ("lora_unet_", "lycoris_")  # of kohya and of LyCORIS: "_" for "." in a module's name

# Of every network; `Modules.comfyui` may be another one.
PREFIXES = (
    PEFT_PREFIX, "transformer.", "model.diffusion_model.", "diffusion_model.", "pipe.dit.",
    *UNDERSCORED,
)
# What kinds of adapters that are not read have in their tensors' names.
KINDS = {
    "lokr_t": "LoKr of convolutions (LyCORIS)", "hada_w": "LoHa (LyCORIS)", "oft_": "OFT",
    "diff": "weight differences",
}

Keys = dict[tuple[str, int | None], dict[str, str]]


class LoraFileError(WeightsError):
    """A LoRA file that cannot be written or read."""


def key_pattern(comfyui: str) -> re.Pattern:
    """Matches the name of a LoRA's tensor, in parts: prefix, module, and one of what it can be.

    That is a, b, alpha, m (a DoRA's lengths), or one of `lokr_files.PARTS`.
    """
    prefixes = "|".join(map(re.escape, (*PREFIXES, comfyui)))
    lokr = "".join(rf"|(?P<{part}>lokr_{part})" for part in lokr_files.PARTS)
    return re.compile(
        rf"(?P<prefix>{prefixes}|)(?P<module>.+)\."
        r"(?:(?P<a>(?:lora_A|lora_down)(?:\.default)?\.weight)"
        r"|(?P<b>(?:lora_B|lora_up)(?:\.default)?\.weight)"
        r"|(?P<m>lora_magnitude_vector(?:\.default)?(?:\.weight)?|dora_scale)"
        rf"|(?P<alpha>alpha){lokr})"
    )


def is_underscored(match: re.Match) -> bool:
    return match["prefix"] in UNDERSCORED


def match_keys(file: Path, names: Iterable[str], modules: Modules) -> tuple[Keys, list]:
    """{(tree path, layer): {part: key}}, and what is wrong with the names.

    Raises:
        LoraFileError: No key looks like LoRA, or none belongs to this network.
    """
    key, modules = key_pattern(modules.comfyui), list(modules)
    underscored = [rule(r.template.replace(".", "_"), r.target) for r in modules]
    names = sorted(names)
    matches = {name: m for name in names if (m := key.fullmatch(name))}
    if not any(m.lastgroup in ("a", "b", *lokr_files.PARTS) for m in matches.values()):
        raise LoraFileError(
            f"{file}: expected LoRA tensors (X.lora_A.weight and X.lora_B.weight, lora_down and "
            "lora_up, or lokr_w1 and lokr_w2), found "
            + (f"{len(names)} others such as {', '.join(names[:3])}; " if names else "none; ")
            + (f"this is {kind}, which is not read here" if (kind := _kind(names))
               else "this is no LoRA")
        )
    slots: dict[tuple[bool, str], Slot] = {}
    for joined, table in ((False, modules), (True, underscored)):
        wanted = {m["module"] for m in matches.values() if is_underscored(m) == joined}
        slots |= {(joined, k): s for k, s in resolve(table, sorted(wanted))[0].items()}
    if not slots:
        example = next(r.template for r in modules).format(layer=0)
        raise LoraFileError(
            f"{file}: none of its {len(names)} tensors belongs to this network: expected modules "
            f"such as {example}, found {', '.join(names[:3])}; it was made for another model, "
            "or has this model's names in a format that is not read here: convert it to diffusers'"
        )
    keys, problems = defaultdict(dict), []
    prefixes = sorted({m["prefix"] or "none" for m in matches.values()})
    if len(prefixes) > 1:
        listed = ", ".join(prefixes)
        problems.append(f"expected one prefix on all keys, got {listed}; split the file")
    for name in names:
        match = matches.get(name)
        slot = match and slots.get((is_underscored(match), match["module"]))
        if slot is None:
            kind = _kind([name])
            problems.append(f"{name}: unknown key, " + (
                f"of {kind}, which is not read here" if kind else
                "belongs to no module of this network"
            ))
            continue
        parts = keys[slot.name, slot.layer]
        if match.lastgroup in parts:
            problems.append(f"{name}: stands for the same weight as {parts[match.lastgroup]}")
        parts[match.lastgroup] = name
    for module, parts in list(keys.items()):
        if problem := _break_parts(parts):
            problems.append(f"{', '.join(parts.values())}: {problem}")
            del keys[module]
    return dict(keys), problems


def _break_parts(parts: Collection[str]) -> str:
    """What is wrong with the parts that a module has; "" for nothing."""
    is_lokr = any(part in parts for part in lokr_files.PARTS)
    if is_lokr and ("a" in parts or "b" in parts):
        return "LoRA and LoKr of the same module; split the file"
    if is_lokr and "m" in parts:
        return "a LoKr with a DoRA's lengths (LyCORIS weight_decompose) is not read here"
    missing = [f"lokr_{p}" for p in lokr_files.lacking(parts)] if is_lokr else [
        f"lora_{m.upper()}" for m in ("a", "b") if m not in parts
    ]
    return f"{' and '.join(missing)} of the same module is missing" if missing else ""


def _kind(names: Iterable[str]) -> str:
    """The kind of adapter that some tensors' names tell, or ""."""
    return next((kind for name in names for mark, kind in KINDS.items()
                 if name.rpartition("/")[2].split(".")[-1].startswith(mark)
                 or f".{mark}" in name), "")
