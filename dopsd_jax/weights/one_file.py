"""Models of which a part is one file, as ComfyUI keeps them, in place of a directory's weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dopsd_jax.core import trees
from dopsd_jax.core.checks import path_problem
from dopsd_jax.weights.load import PREFIXES, kept_dtypes, open_tensors
from dopsd_jax.weights.names import PART, Rule, WeightsError, fused_parts

PARTS = ("transformer", "vae", "text_encoder")
KEYS = tuple(f"{part}_file" for part in PARTS)  # what users call these files
LORA = re.compile(r"lora_(A|B|up|down|unet)|\.alpha$")


def by_part(**files: str | Path) -> dict[str, Path]:
    """{"transformer_file": ..} -> {"transformer": ..}, without those that are not given."""
    return {name.removesuffix("_file"): Path(file) for name, file in files.items() if str(file)}


def check(
    part: str, file: Path, tables: Mapping[str, Iterable[Rule]], shapes: trees.Tree, model: str,
    others: Mapping[str, Iterable[Rule]],
) -> None:
    """Refuses a file that is not of this part of this model; reads no weights.

    Args:
        part: One of PARTS.
        file: Given for it.
        tables: Name tables of the model's parts.
        shapes: Of the part's parameters.
        model: Its kind, for messages.
        others: Name tables of transformers of other kinds of models.

    Raises:
        WeightsError: No safetensors file, one of something else, or every tensor and parameter
            that does not fit.
    """
    key = f"{part}_file"
    if problem := path_problem(str(file)):
        raise WeightsError(f"{key}: {str(file)[:60]}.. {problem}")
    try:
        names = list(open_tensors([file], PREFIXES[part]))
        if _share(tables[part], names) <= 0.5:
            raise WeightsError(
                f"{file}: expected the {_words(part)} of a {model}, got "
                f"{_what(names, part, tables, model, others)}"
            )
        kept_dtypes([file], tables[part], shapes, PREFIXES[part])
    except WeightsError as e:
        raise WeightsError(f"{key}: {e}") from e


def _what(
    names: list[str], part: str, tables: Mapping[str, Iterable[Rule]], model: str,
    others: Mapping[str, Iterable[Rule]],
) -> str:
    """What a file that is not of a part seems to hold."""
    if any(LORA.search(name) for name in names):
        return "a LoRA, which goes on top of a model (--lora, base_lora or init_lora)"
    known = {f"the {_words(p)} of one": t for p, t in tables.items() if p in PARTS and p != part}
    known |= {f"the transformer of a {name}": table for name, table in others.items()}
    shares = {what: _share(table, names) for what, table in known.items()}
    best = max(shares, key=shares.get, default=None)
    if best is not None and shares[best] > 0.5:
        return best
    listed = ", ".join(sorted(names)[:3]) or "none"
    return f"{len(names)} tensors of something else, such as {listed}"


def _share(table: Iterable[Rule], names: list[str]) -> float:
    """How many of the names a table knows."""
    table = list(table)
    fused = fused_parts(table, names)
    patterns = [re.compile(r.pattern) for r in table if PART not in r.pattern]
    known = sum(
        name in fused or any(p.fullmatch(name) for p in patterns) for name in names
    )
    return known / max(len(names), 1)


def _words(part: str) -> str:
    return {"vae": "VAE"}.get(part, part.replace("_", " "))
