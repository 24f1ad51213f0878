"""Executed shape annotations: one line per public boundary, run at trace time."""

from __future__ import annotations

from typing import Any


def check_shapes(where: str, **arrays: tuple[Any, str]) -> dict[str, int]:
    """Checks named arrays against dims letters and returns the size of each letter.

    Args:
        where: Name of the caller, for the message.
        **arrays: `name=(array, "B h w C")`. A number in place of a letter must match exactly;
            an array that is None is skipped.

    Returns:
        Dict from letter to size.

    Raises:
        ValueError: All mismatches together, with every size already bound.
    """
    sizes: dict[str, int] = {}
    problems = []
    for name, (array, spec) in arrays.items():
        if array is None:
            continue
        dims = spec.split()
        if len(dims) != array.ndim:
            problems.append(f"{name}: expected [{spec}], got shape {tuple(array.shape)}")
            continue
        for dim, size in zip(dims, array.shape, strict=True):
            expected = int(dim) if dim.isdigit() else sizes.setdefault(dim, size)
            if expected != size:
                problems.append(
                    f"{name}: expected [{spec}] with {dim}={expected}, got shape "
                    f"{tuple(array.shape)}"
                )
                break
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return sizes
