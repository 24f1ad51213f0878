"""Executed shape annotations, one line per public boundary; and problems told all together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def noted(problems: list[str], name: str = "") -> Iterator[None]:
    """Adds the message of a ValueError to `problems`, after "name: ", instead of raising it."""
    try:
        yield
    except ValueError as e:
        problems.append(f"{name}: {e}" if name else str(e))


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
