"""Reading the LoRA files that lora_files.py writes, and their like from other tools.

So are those of DoRA and LoKr, whose leaves models/adapters.py describes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dopsd_jax.core import trees
from dopsd_jax.core.checks import COUNT, SCALE, TEXT, Kind, is_whole, value_problems
from dopsd_jax.weights import lokr_files
from dopsd_jax.weights.lora_checks import check_dims, check_layers, key_of
from dopsd_jax.weights.lora_layouts import DiffusersView
from dopsd_jax.weights.lora_names import (
    PEFT_PREFIX,
    Keys,
    LoraFileError,
    key_pattern,
    match_keys,
)
from dopsd_jax.weights.mapped import PICKLES, open_safetensors, read_metadata
from dopsd_jax.weights.names import Modules, WeightsError

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
STUDENT = "student"  # the published torch code keeps its two adapters in student/ and teacher/
OUR_METADATA = "dopsd_jax_lora"
BASE_DTYPE = "dopsd_jax_base_dtype"  # in which the weights were kept that it was trained on
DIFFUSERS_METADATA = "lora_adapter_metadata"  # of pipe.save_lora_weights

SAME = 1e-6  # relative difference of two alphas that float32 may have rounded
FLOATS = ("F16", "BF16", "F32", "F64")

# What lora_files.py writes as OUR_METADATA.
OUR_KINDS = {
    "rank": COUNT, "alpha": SCALE, "base_model": TEXT,
    "scale_in_b": Kind("true or false", lambda x: isinstance(x, bool)),
}

# PEFT's options that change what the tensors mean, with the only value read here, by kind. A DoRA
# is a LORA with use_dora.
PEFT_OPTIONS = {
    "LORA": {
        "peft_type": "LORA",
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    },
    "LOKR": {"peft_type": "LOKR", "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None},
}
PEFT_ALPHA = {"LORA": "lora_alpha", "LOKR": "alpha"}


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


def read_lora(
    path: str | Path, modules: Modules, shapes: trees.Tree | None = None
) -> tuple[trees.Tree, LoraSpec]:
    """Reads a LoRA, DoRA or LoKr of any format that is written here, recognised by its content.

    Also read: `lora_down`/`lora_up` for `lora_A`/`lora_B`, `dora_scale` for
    `lora_magnitude_vector`, kohya's `lora_unet_` and LyCORIS' `lycoris_` names, names without a
    prefix, DiffSynth-Studio's (`pipe.dit.X.lora_A.default.weight`), the layout of the
    network's makers, in which q, k and v are one module, files of diffusers' `save_lora_weights`,
    and the directory of the published torch code, whose `student` folder is taken. Without any
    alpha the scale is 1, as elsewhere.

    Args:
        path: A .safetensors file or a directory with one.
        modules: Module names of the network, from its name table.
        shapes: Params tree of the network (arrays or ShapeDtypeStruct) to check sizes and number
            of layers against; without it a stack has as many layers as the file's highest index.

    Returns:
        Tree of float32 NumPy leaves `a [(layers,) in, r]`, `b [(layers,) r, out]`, of a DoRA also
        `m [(layers,) out]`, of a LoKr those of models/adapters.py, and its spec. Where alpha
        differs between modules it is folded into `b` and spec.alpha is the rank. Where ranks
        differ they are filled up with zeros to the highest, and so are layers of a stack that the
        file does not change.

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
        handle = DiffusersView(handle, key_pattern(modules.comfyui), modules)
        keys, problems = match_keys(file, handle.keys(), modules)
        problems += handle.problems
        found = {k: handle.get_slice(k) for parts in keys.values() for k in parts.values()}
        problems += [
            f"{key}: expected floats ({', '.join(FLOATS)}), got {entry.get_dtype()}"
            for key, entry in found.items()
            if entry.get_dtype() not in FLOATS and not key.endswith(".alpha")
        ]
        dims = {
            module: {part: tuple(found[key].get_shape()) for part, key in parts.items()}
            for module, parts in keys.items()
        }
        ranks, more = check_dims(keys, dims)
        problems += more
        layers, more = check_layers(keys, dims, handle, list(modules), shapes)
        raise_all(file, problems + more)

        alphas: dict[tuple[str, int | None], float] = {}
        for module, parts in keys.items():
            if "alpha" in parts:
                alphas[module] = alpha = float(handle.get_tensor(parts["alpha"]).item())
                if not math.isfinite(alpha) or alpha == 0:
                    problems.append(f"{parts['alpha']}: expected a number but 0, got {alpha}")
        raise_all(file, problems)
        scale = _find_scale(file, keys, ranks, alphas, handle.metadata() or {})
        flat = _read_leaves(handle, keys, layers, scale, problems)
        raise_all(file, problems)
    return trees.unflatten(flat), scale.spec


def _read_leaves(
    handle: DiffusersView, keys: Keys, layers: Mapping[str, int], scale: _Scale,
    problems: list[str],
) -> dict[str, np.ndarray]:
    """The flat tree; adds to `problems` what holds no numbers."""
    flat: dict[str, np.ndarray] = {}
    for module, parts in keys.items():
        tensors = {}
        for part in parts.keys() - {"alpha"}:
            tensors[part] = handle.get_tensor(parts[part]).astype(np.float32)
            if not np.isfinite(tensors[part]).all():
                problems.append(f"{parts[part]}: holds NaN or infinity")
        if "a" in parts:
            more = (0, scale.spec.rank - len(tensors["a"]))  # where ranks differ
            leaves = {"a": np.pad(tensors["a"].T, ((0, 0), more)),
                      "b": np.pad(tensors["b"].T, (more, (0, 0)))}
            leaves |= {"m": tensors["m"].ravel()} if "m" in parts else {}
        else:
            index, count = handle.part(key_of(parts))
            leaves = lokr_files.leaves(tensors, scale.whole.get(module, 1.0), index, count)
        target, layer = module
        for leaf, value in leaves.items():
            if leaf == "b" or leaf.endswith("w2_up"):
                value = scale.apply(module, value)
            name = f"{target}/{leaf}"
            if layer is None:
                flat[name] = np.ascontiguousarray(value)
                continue
            if name not in flat:
                flat[name] = np.zeros((layers[target], *value.shape), np.float32)
            flat[name][layer] = value
    return flat


def fingerprint(path: str | Path) -> str:
    """SHA-256 of all that `read_lora` reads there: the file, and a PEFT config beside it."""
    file = _locate(Path(path))
    digest = hashlib.sha256(file.read_bytes())
    config = file.with_name(PEFT_CONFIG)
    if file.name == PEFT_WEIGHTS and config.is_file():
        digest.update(config.read_bytes())
    return digest.hexdigest()


def base_dtype(path: str | Path) -> str:
    """What a LoRA file says of how the weights were kept that it was trained on; "" if nothing.

    Raises:
        LoraFileError: No file, or one that is no safetensors file.
    """
    try:
        return read_metadata(_locate(Path(path))).get(BASE_DTYPE, "")
    except WeightsError as e:
        raise LoraFileError(str(e)) from e


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


@dataclass(frozen=True)
class _Scale:
    """What alpha says, and what to do with the leaf that it stands in.

    Attributes:
        spec: Of the LoRA.
        folded: What a module's leaf is multiplied by, where modules differ.
        divided: Whether the file's leaves have spec.scale in them.
        whole: Scales of LoKr modules whose larger factor is whole.
    """

    spec: LoraSpec
    folded: dict = field(default_factory=dict)
    divided: bool = False
    whole: dict = field(default_factory=dict)

    def apply(self, module: tuple[str, int | None], value: np.ndarray) -> np.ndarray:
        if self.divided:
            return (value.astype(np.float64) / self.spec.scale).astype(np.float32)
        return value * np.float32(self.folded[module]) if module in self.folded else value


def _find_scale(
    file: Path, keys: Keys, ranks: dict, alphas: dict, metadata: dict[str, str]
) -> _Scale:
    """Finds alpha where the format keeps it."""
    ours = _parse(f"{file}, {OUR_METADATA}", metadata.get(OUR_METADATA, "{}"))
    theirs = _parse(f"{file}, {DIFFUSERS_METADATA}", metadata.get(DIFFUSERS_METADATA, "{}"))
    is_peft = any(k.startswith(PEFT_PREFIX) for parts in keys.values() for k in parts.values())
    if alphas and (is_peft or theirs):
        raise LoraFileError(
            f"{file}: expected alpha in the config or in .alpha tensors, got both; tools disagree "
            "on what that means, save the LoRA again with one of them"
        )
    ranked = {m: r for m, r in ranks.items() if "w2" not in keys[m]}
    rank = max(ranked.values(), default=None)
    whole = [module for module, parts in keys.items() if "w2" in parts]
    if ours and (wrong := value_problems({"scale_in_b": False, **ours}, OUR_KINDS)):
        raise LoraFileError(f"{file}, {OUR_METADATA}: " + "; ".join(wrong.values()))
    if ours.get("scale_in_b") and not alphas and rank in (None, ours["rank"]):
        return _Scale(LoraSpec(ours["rank"], ours["alpha"], ours["base_model"]), divided=True)
    if is_peft or theirs:
        if len(set(ranked.values())) > 1:
            raise LoraFileError(
                f"{file}: expected one rank in all modules of a PEFT adapter (rank_pattern is not "
                f"read), got {', '.join(map(str, sorted(set(ranked.values()))))}"
            )
        config = _read_json(file.with_name(PEFT_CONFIG)) if is_peft else {
            k.removeprefix("transformer."): v for k, v in theirs.items()
        }
        spec = _spec_of_config(file, config, rank, keys)
        return _Scale(spec, whole=dict.fromkeys(whole, spec.scale))
    scales = {m: alphas[m] / ranks[m] for m in whole if m in alphas and ranks[m]}
    by_module = {m: alphas.get(m, float(r)) * (1 if r == rank else rank / max(r, 1))
                 for m, r in ranked.items()}  # alpha / rank is that of the module
    found = by_module.values()
    if found and max(found) - min(found) <= SAME * abs(max(found)):
        alpha = next(iter(found))
        if abs(ours.get("alpha", alpha) - alpha) <= SAME * abs(alpha):
            alpha = ours.get("alpha", alpha)  # the tensor holds it to float32 only
        return _Scale(LoraSpec(rank, alpha, ours.get("base_model", "")), whole=scales)
    if rank is None:
        return _Scale(
            LoraSpec(ours.get("rank", 1), ours.get("alpha", 1.0), ours.get("base_model", "")),
            whole=scales,
        )
    folded = {m: alpha / rank for m, alpha in by_module.items()}
    return _Scale(LoraSpec(rank, float(rank), ours.get("base_model", "")), folded, whole=scales)


def _spec_of_config(file: Path, config: dict, rank: int | None, keys: Keys) -> LoraSpec:
    """Rank and alpha of a PEFT config; refuses options under which they would mean another LoRA."""
    kind = "LORA" if any("a" in parts for parts in keys.values()) else "LOKR"
    options = dict(PEFT_OPTIONS[kind])
    if any("m" in parts for parts in keys.values()):
        options["use_dora"] = True
    problems = [
        f"{key}: expected {expected!r}, got {config[key]!r}; such a LoRA is not read here"
        for key, expected in options.items()
        if key in config and (config[key] or None) != (expected or None)
    ]
    if not is_whole(config.get("r")) or config["r"] != (rank or config["r"]):
        problems.append(f"r: expected {rank} as in the tensors, got {config.get('r')!r}")
    alpha = config.get(PEFT_ALPHA[kind])
    if not SCALE.holds(alpha):
        problems.append(f"{PEFT_ALPHA[kind]}: expected {SCALE.words}, got {alpha!r:.60}")
    base_model = config.get("base_model_name_or_path") or ""
    if not isinstance(base_model, str):
        problems.append(f"base_model_name_or_path: expected a text, got {base_model!r:.60}")
    raise_all(f"{file}, its LoRA config", problems)
    return LoraSpec(config["r"], float(alpha), base_model)


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
