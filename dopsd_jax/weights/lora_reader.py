"""Reading the LoRA files that lora_files.py writes, and their like from other tools."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dopsd_jax.core import trees
from dopsd_jax.core.checks import COUNT, SCALE, TEXT, Kind, is_whole, value_problems
from dopsd_jax.weights.lora_layouts import KOHYA, DiffusersView
from dopsd_jax.weights.mapped import PICKLES, open_safetensors
from dopsd_jax.weights.names import Modules, Rule, Slot, WeightsError, resolve, rule

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
STUDENT = "student"  # the published torch code keeps its two adapters in student/ and teacher/
OUR_METADATA = "dopsd_jax_lora"
DIFFUSERS_METADATA = "lora_adapter_metadata"  # of pipe.save_lora_weights

# Of every network; `Modules.comfyui` may be another one.
PREFIXES = (
    PEFT_PREFIX, "transformer.", "model.diffusion_model.", "diffusion_model.", "pipe.dit.", KOHYA
)
# What other kinds of adapters have in their tensors' names.
KINDS = {
    "lokr_w": "LoKr (LyCORIS)", "hada_w": "LoHa (LyCORIS)", "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA (PEFT)", "oft_": "OFT", "diff": "weight differences",
}
SAME = 1e-6  # relative difference of two alphas that float32 may have rounded
FLOATS = ("F16", "BF16", "F32", "F64")

# What lora_files.py writes as OUR_METADATA.
OUR_KINDS = {
    "rank": COUNT, "alpha": SCALE, "base_model": TEXT,
    "scale_in_b": Kind("true or false", lambda x: isinstance(x, bool)),
}

# PEFT's options that change what lora_A and lora_B mean, with the only value read here.
PEFT_OPTIONS = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


class LoraFileError(WeightsError):
    """A LoRA file that cannot be written or read."""


@dataclass(frozen=True)
class LoraSpec:
    """What stands beside the tensors.

    Attributes:
        rank: r, at least 1.
        alpha: The output gains alpha / rank (x a) b.
        base_model: Name or path of the model it was trained on, for PEFT's config; may be empty.
    """

    rank: int
    alpha: float
    base_model: str = ""

    def __post_init__(self):
        if self.rank < 1 or not (math.isfinite(self.alpha) and self.alpha != 0):
            raise LoraFileError(
                "expected a LoRA rank of at least 1 and a finite alpha other than 0, "
                f"got rank {self.rank}, alpha {self.alpha}"
            )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def raise_all(where: str | Path, problems: list[str]) -> None:
    """Raises one LoraFileError that lists all problems, if there are any."""
    if problems:
        listed = "\n  ".join(problems[:40])
        more = f"\n  ... and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise LoraFileError(f"{where}: {len(problems)} problems:\n  {listed}{more}")


def stack_of(template: str) -> str:
    """The part of a module name template before its layer index."""
    return template.partition("{layer}")[0]


def read_lora(
    path: str | Path, modules: Modules, shapes: trees.Tree | None = None
) -> tuple[trees.Tree, LoraSpec]:
    """Reads a LoRA of any format that is written here, recognised by its content.

    Also read: `lora_down`/`lora_up` for `lora_A`/`lora_B`, kohya's `lora_unet_` names, names
    without a prefix, DiffSynth-Studio's (`pipe.dit.X.lora_A.default.weight`), the layout of the
    network's makers, in which q, k and v are one module, files of diffusers' `save_lora_weights`,
    and the directory of the published torch code, whose `student` folder is taken. Without any
    alpha the scale is 1, as elsewhere.

    Args:
        path: A .safetensors file or a directory with one.
        modules: Module names of the network, from its name table.
        shapes: Params tree of the network (arrays or ShapeDtypeStruct) to check sizes and number
            of layers against; without it a stack has as many layers as the file's highest index.

    Returns:
        LoRA tree of float32 NumPy leaves `a [(layers,) in, r]`, `b [(layers,) r, out]`, and its
        spec. Where alpha differs between modules it is folded into `b` and spec.alpha is the rank.

    Raises:
        LoraFileError: Everything that is wrong with names, shapes and scale, together; a file that
            is missing, truncated, a pickle, no LoRA, or made for another model.
    """
    file = _locate(Path(path))
    try:
        handle = open_safetensors(file)
    except WeightsError as e:
        raise LoraFileError(str(e)) from e
    with handle:
        handle = DiffusersView(handle, _key_pattern(modules.comfyui), modules)
        keys, problems = _match_keys(file, handle.keys(), modules)
        problems += handle.problems
        found = {k: handle.get_slice(k) for parts in keys.values() for k in parts.values()}
        problems += [
            f"{key}: expected floats ({', '.join(FLOATS)}), got {entry.get_dtype()}"
            for key, entry in found.items()
            if entry.get_dtype() not in FLOATS and not key.endswith(".alpha")
        ]
        dims = {key: tuple(entry.get_shape()) for key, entry in found.items()}
        rank, more = _check_dims(keys, dims)
        problems += more
        layers, more = _check_layers(keys, dims, list(modules), shapes)
        raise_all(file, problems + more)

        flat: dict[str, np.ndarray] = {}
        alphas: dict[tuple[str, int | None], float] = {}
        for (target, layer), parts in keys.items():
            for leaf in ("a", "b"):
                value = handle.get_tensor(parts[leaf]).astype(np.float32).T
                if not np.isfinite(value).all():
                    problems.append(f"{parts[leaf]}: holds NaN or infinity")
                name = f"{target}/{leaf}"
                if layer is None:
                    flat[name] = np.ascontiguousarray(value)
                    continue
                if name not in flat:
                    flat[name] = np.empty((layers[target], *value.shape), np.float32)
                flat[name][layer] = value
            if "alpha" in parts:
                alphas[target, layer] = alpha = float(handle.get_tensor(parts["alpha"]).item())
                if not math.isfinite(alpha) or alpha == 0:
                    problems.append(f"{parts['alpha']}: expected a number but 0, got {alpha}")
        raise_all(file, problems)
        is_peft = any(key.startswith(PEFT_PREFIX) for key in found)
        spec = _apply_scale(file, flat, rank, alphas, keys, is_peft, handle.metadata() or {})
    return trees.unflatten(flat), spec


def fingerprint(path: str | Path) -> str:
    """SHA-256 of all that `read_lora` reads there: the file, and a PEFT config beside it."""
    file = _locate(Path(path))
    digest = hashlib.sha256(file.read_bytes())
    config = file.with_name(PEFT_CONFIG)
    if file.name == PEFT_WEIGHTS and config.is_file():
        digest.update(config.read_bytes())
    return digest.hexdigest()


def _locate(path: Path) -> Path:
    """The safetensors file meant by a file or directory name."""
    if not path.is_dir():
        return path  # pickled, missing and unreadable files are refused where it is opened
    for folder in (path, path / STUDENT):
        if (folder / PEFT_WEIGHTS).is_file():
            return folder / PEFT_WEIGHTS
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    pickles = [p for f in (path, path / STUDENT) if f.is_dir() for p in sorted(f.iterdir())
               if p.suffix in PICKLES]
    if not files and pickles:
        raise LoraFileError(
            f"{path}: expected {PEFT_WEIGHTS}, found only pickled weights "
            f"({', '.join(str(p.relative_to(path)) for p in pickles)}); these can run code when "
            "opened and are never read here, convert them to safetensors first"
        )
    raise LoraFileError(
        f"{path}: expected {PEFT_WEIGHTS} (there or in {STUDENT}/) or a single .safetensors file, "
        f"found {', '.join(p.name for p in files) or 'none'}; name the file itself"
    )


Keys = dict[tuple[str, int | None], dict[str, str]]


def _key_pattern(comfyui: str) -> re.Pattern:
    """Matches the name of a LoRA's tensor, in parts."""
    prefixes = "|".join(map(re.escape, (*PREFIXES, comfyui)))
    return re.compile(
        rf"(?P<prefix>{prefixes}|)(?P<module>.+)\."
        r"(?:(?P<a>(?:lora_A|lora_down)(?:\.default)?\.weight)"
        r"|(?P<b>(?:lora_B|lora_up)(?:\.default)?\.weight)"
        r"|(?P<alpha>alpha))"
    )


def _kind(names: Iterable[str]) -> str:
    """The kind of adapter that some tensors' names tell, or ""."""
    return next((kind for name in names for mark, kind in KINDS.items()
                 if name.rpartition("/")[2].split(".")[-1].startswith(mark)
                 or f".{mark}" in name), "")


def _match_keys(file: Path, names: Iterable[str], modules: Modules) -> tuple[Keys, list]:
    """{(tree path, layer): {"a" | "b" | "alpha": key}}, and what is wrong with the names.

    Raises:
        LoraFileError: No key looks like LoRA, or none belongs to this network.
    """
    key, modules = _key_pattern(modules.comfyui), list(modules)
    kohya = [rule(r.template.replace(".", "_"), r.target) for r in modules]
    names = sorted(names)
    matches = {name: m for name in names if (m := key.fullmatch(name))}
    if not any(m["a"] or m["b"] for m in matches.values()):
        raise LoraFileError(
            f"{file}: expected LoRA tensors (X.lora_A.weight and X.lora_B.weight, or lora_down and "
            f"lora_up), found {len(names)} others such as {', '.join(names[:3]) or 'none'}; "
            + (f"this is {kind}, which is not read here" if (kind := _kind(names))
               else "this is no LoRA")
        )
    slots: dict[tuple[bool, str], Slot] = {}
    for is_kohya, table in ((False, modules), (True, kohya)):
        wanted = {
            m["module"] for m in matches.values() if (m["prefix"] == KOHYA) == is_kohya
        }
        slots |= {(is_kohya, k): s for k, s in resolve(table, sorted(wanted))[0].items()}
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
        slot = match and slots.get((match["prefix"] == KOHYA, match["module"]))
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
    for (target, layer), parts in list(keys.items()):
        if missing := {"a", "b"} - parts.keys():
            lacking = " and ".join(f"lora_{m.upper()}" for m in sorted(missing))
            problems.append(f"{', '.join(parts.values())}: {lacking} of the same module is missing")
            del keys[target, layer]
    return dict(keys), problems


def _check_dims(keys: Keys, dims: dict[str, tuple]) -> tuple[int, list[str]]:
    """The one rank of all pairs, and what is wrong with the shapes by themselves."""
    problems, ranks = [], defaultdict(list)
    for parts in keys.values():
        a, b = dims[parts["a"]], dims[parts["b"]]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            problems.append(f"{parts['a']}: expected (r, in) beside (out, r), got {a} beside {b}")
        else:
            ranks[a[0]].append(parts["a"])
        if "alpha" in parts and math.prod(dims[parts["alpha"]]) != 1:
            problems.append(f"{parts['alpha']}: expected one number, got {dims[parts['alpha']]}")
    if len(ranks) > 1:
        listed = "; ".join(f"{r} in {len(n)}, first {n[0]}" for r, n in sorted(ranks.items()))
        problems.append(f"expected one rank in all modules, got {listed}; resize the LoRA to one")
    return next(iter(ranks), 0), problems


def _check_layers(
    keys: Keys, dims: dict[str, tuple], modules: list[Rule], shapes: trees.Tree | None
) -> tuple[dict[str, int], list[str]]:
    """Number of layers by tree path, and what does not fit the network or lacks layers."""
    stacks = {r.target: stack_of(r.template) for r in modules}
    params = trees.flatten(shapes) if shapes is not None else None
    problems, present, highest = [], defaultdict(set), defaultdict(int)
    sizes: dict[str, set] = defaultdict(set)
    for (target, layer), parts in keys.items():
        if layer is not None:
            present[target].add(layer)
            sizes[target].add((dims[parts["a"]][1:], dims[parts["b"]][:1]))
            highest[stacks[target]] = max(highest[stacks[target]], layer + 1)
        if params is None:
            continue
        if f"{target}/kernel" not in params:
            problems.append(f"{parts['a']}: the network has no parameter {target}/kernel")
            continue
        *_, size_in, size_out = params[f"{target}/kernel"].shape
        a, b = dims[parts["a"]], dims[parts["b"]]
        if (a[-1:], b[:1]) != ((size_in,), (size_out,)):
            problems.append(
                f"{parts['a']}: expected (r, {size_in}) and (out, r) = ({size_out}, r), got {a} "
                f"and {b}; is it of another model size?"
            )
    layers = {}
    for target, have in present.items():
        kernel = params.get(f"{target}/kernel") if params is not None else None
        layers[target] = count = highest[stacks[target]] if kernel is None else kernel.shape[0]
        if len(sizes[target]) > 1 and kernel is None:
            problems.append(f"{target}: expected one shape in all layers, got {sizes[target]}")
        if max(have) >= count:
            problems.append(f"{target}: the network has {count} layers, the file one {max(have)}")
        # A file may name any index, so the missing ones are not listed beyond the first few.
        if missing := list(itertools.islice((i for i in range(count) if i not in have), 10)):
            problems.append(
                f"{target}: expected all {count} layers, got {len(have)}, missing "
                f"{', '.join(map(str, missing))}{' ..' if len(missing) == 10 else ''}; a LoRA of "
                "some layers only is not read, add the missing ones with a lora_B of zeros"
            )
    return layers, problems


def _apply_scale(
    file: Path,
    flat: dict[str, np.ndarray],
    rank: int,
    alphas: dict[tuple[str, int | None], float],
    keys: Keys,
    is_peft: bool,
    metadata: dict[str, str],
) -> LoraSpec:
    """Finds alpha where the format keeps it; may rescale the `b` of `flat` in place."""
    ours = _parse(f"{file}, {OUR_METADATA}", metadata.get(OUR_METADATA, "{}"))
    theirs = _parse(f"{file}, {DIFFUSERS_METADATA}", metadata.get(DIFFUSERS_METADATA, "{}"))
    if alphas and (is_peft or theirs):
        raise LoraFileError(
            f"{file}: expected alpha in the config or in .alpha tensors, got both; tools disagree "
            "on what that means, save the LoRA again with one of them"
        )
    if is_peft:
        return _spec_of_config(file, _read_json(file.with_name(PEFT_CONFIG)), rank)
    if theirs:
        config = {k.removeprefix("transformer."): v for k, v in theirs.items()}
        return _spec_of_config(file, config, rank)
    if ours and (wrong := value_problems({"scale_in_b": False, **ours}, OUR_KINDS)):
        raise LoraFileError(f"{file}, {OUR_METADATA}: " + "; ".join(wrong.values()))
    if ours.get("scale_in_b") and not alphas and ours["rank"] == rank:
        spec = LoraSpec(rank, ours["alpha"], ours["base_model"])
        for name in flat:
            if name.endswith("/b"):
                flat[name] = (flat[name].astype(np.float64) / spec.scale).astype(np.float32)
        return spec
    by_module = {key: alphas.get(key, float(rank)) for key in keys}
    if max(by_module.values()) - min(by_module.values()) <= SAME * abs(max(by_module.values())):
        alpha = by_module.popitem()[1]
        if abs(ours.get("alpha", alpha) - alpha) <= SAME * abs(alpha):
            alpha = ours.get("alpha", alpha)  # the tensor holds it to float32 only
        return LoraSpec(rank, alpha, ours.get("base_model", ""))
    for (target, layer), alpha in by_module.items():
        flat[f"{target}/b"][... if layer is None else layer] *= np.float32(alpha / rank)
    return LoraSpec(rank, float(rank), ours.get("base_model", ""))


def _spec_of_config(file: Path, config: dict, rank: int) -> LoraSpec:
    """Rank and alpha of a PEFT config; refuses options under which they would mean another LoRA."""
    problems = [
        f"{key}: expected {expected!r}, got {config[key]!r}; such a LoRA is not read here"
        for key, expected in PEFT_OPTIONS.items()
        if key in config and (config[key] or None) != (expected or None)
    ]
    if not is_whole(config.get("r")) or config["r"] != rank:
        problems.append(f"r: expected {rank} as in the tensors, got {config.get('r')!r}")
    alpha = config.get("lora_alpha")
    if not SCALE.holds(alpha):
        problems.append(f"lora_alpha: expected {SCALE.words}, got {alpha!r:.60}")
    base_model = config.get("base_model_name_or_path") or ""
    if not isinstance(base_model, str):
        problems.append(f"base_model_name_or_path: expected a text, got {base_model!r:.60}")
    raise_all(f"{file}, its LoRA config", problems)
    return LoraSpec(rank, float(alpha), base_model)


def _read_json(path: Path) -> dict:
    try:
        return _parse(path, path.read_text())
    except FileNotFoundError as e:
        raise LoraFileError(
            f"{path}: no such file; a PEFT adapter keeps its alpha there, put it beside the tensors"
        ) from e


def _parse(where: str | Path, text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise LoraFileError(f"{where}: not valid JSON ({e})") from e
    if not isinstance(value, dict):
        raise LoraFileError(f"{where}: expected a JSON object, got {text[:40]}")
    return value
