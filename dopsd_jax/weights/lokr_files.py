"""LoKr in files: which tensors a module has, their sizes, and what leaves they become.

A file has factors of the torch weight (out, in) = w1 kron w2: `lokr_w1 (o1, i1)`, `lokr_w2 (o2,
i2)`, each of which may itself be a product, `lokr_w1_a (o1, r) lokr_w1_b (r, i1)`. The first factor
is small and is multiplied out here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from dopsd_jax.method.lokr import factorization
from dopsd_jax.models import adapters

PARTS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
Dims = Mapping[str, tuple[int, ...]]


def lacking(parts: Collection[str]) -> list[str]:
    """Which of PARTS are missing beside those that are there."""
    missing = []
    for factor in ("w1", "w2"):
        halves = [f"{factor}_a", f"{factor}_b"]
        if factor not in parts:
            there = any(h in parts for h in halves)
            missing += [h for h in halves if h not in parts] if there else [factor]
    return missing


def rank_of(dims: Dims) -> int:
    """The rank of a module's product; 0 where both factors are whole.

    Where both are products, LyCORIS knows one rank for both.
    """
    return next((dims[part][0] for part in ("w2_b", "w1_b") if part in dims), 0)


def sizes(dims: Dims) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """((o1, o2), (i1, i2)) of a module; None where tensors do not go together."""
    found = []
    for factor in ("w1", "w2"):
        whole = dims.get(factor)
        if whole is None:
            a, b = dims[f"{factor}_a"], dims[f"{factor}_b"]
            if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
                return None
            whole = (a[0], b[1])
        if len(whole) != 2 or not all(whole):
            return None
        found.append(whole)
    return tuple(zip(*found, strict=True))


def leaves(
    tensors: Mapping[str, np.ndarray], scale: float, index: int = 0, count: int = 1
) -> dict[str, np.ndarray]:
    """The leaves of models/adapters.py that a module's tensors become, float32.

    Args:
        tensors: By PARTS.
        scale: Multiplied in where no rank is left that the LoRA's own scale could stand beside.
        index, count: Of a module that is several in diffusers' layout: of which of equal parts of
            its rows.
    """
    made = {}
    first = tensors.get("w1")
    if first is None:
        first = (tensors["w1_a"].astype(np.float64) @ tensors["w1_b"]).astype(np.float32)
    if "w2" in tensors:
        first = first if scale == 1 else first * np.float32(scale)
        made["w2"] = tensors["w2"].T
    else:
        made["w2_down"], made["w2_up"] = tensors["w2_b"].T, tensors["w2_a"].T
    made["w1"] = first.T
    return _rows_of(made, index, count) if count > 1 else made


def _rows_of(whole: dict[str, np.ndarray], index: int, count: int) -> dict[str, np.ndarray]:
    """A LoKr of one of `count` equal parts of the outputs, exactly.

    Where the parts cut through the second factor, it is cut too, into `count` pieces, and the part
    is the sum of a product with each.
    """
    first, last = whole["w1"], "w2" if "w2" in whole else "w2_up"
    out_1 = first.shape[1]
    if out_1 % count == 0:
        return whole | {"w1": np.split(first, count, 1)[index]}
    pieces = np.split(whole[last], count, 1)
    # Outputs in order are (p, c): column p of the first factor, piece c of the second.
    p, c = np.divmod(np.arange(index * out_1, (index + 1) * out_1), count)
    terms = [
        whole | {"w1": np.where(c == piece, first[:, p], 0), last: pieces[piece]}
        for piece in range(count) if (c == piece).any()
    ]
    if len(terms) == 1:
        return terms[0]
    return {f"{n}/{name}": x for n, term in enumerate(terms) for name, x in term.items()}


def decompose_factor(found: Collection[adapters.Leaves], rank: int) -> int | None:
    """The one factor that PEFT and diffusers take all of these for; None if there is none.

    Args:
        found: Leaves of every linear, one LoKr each.
        rank: By which PEFT decides whether a second factor is whole.
    """
    factors = set()
    for term in found:
        second = term.get("w2", term.get("w2_down")).shape[-2], term.get(
            "w2", term.get("w2_up")).shape[-1]
        if ("w2" in term) != (rank >= max(second) / 2):
            return None
        factors |= set(zip(term["w1"].shape[-2:], second, strict=True))
    candidates = sorted({first for first, _ in factors}) + [-1]
    return next((f for f in candidates if all(
        _peft_factorization(first * rest, f) == (first, rest) for first, rest in factors
    )), None)


def _peft_factorization(size: int, factor: int) -> tuple[int, int]:
    """PEFT's copy of LyCORIS' rule, where a factor that divides comes first whatever its size."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    return factorization(size, factor)
