"""Checks of array shapes and of values read from files, whose problems are raised together."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAX_NAME = 255   # bytes of a name in a folder
MAX_PATH = 3000  # bytes of a path; Linux takes 4095, the rest is for what lies below it


@contextlib.contextmanager
def noted(problems: list[str], name: str = "") -> Iterator[None]:
    """Adds the message of a ValueError to `problems`, after "name: ", instead of raising it."""
    try:
        yield
    except ValueError as e:
        problems.append(f"{name}: {e}" if name else str(e))


def is_whole(x: Any) -> bool:
    """Whether x is an integer, NumPy's included, which neither True nor 2.0 is."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Whether x is a finite int or float, NumPy's included, which True is not."""
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        return False
    try:
        return math.isfinite(x)
    except OverflowError:  # an int that no float holds
        return False


def path_problem(path: str) -> str:
    """What no file system takes of a path, asked before it is looked for; "" for nothing.

    Looking for such a path is an OSError in some places and a ValueError in others.
    """
    if "\0" in path:
        return "holds a null character"
    names = [name.encode(errors="surrogatepass") for name in path.split("/")]
    if (length := max(map(len, names))) > MAX_NAME:
        return f"holds a name of {length} bytes, at most {MAX_NAME} are possible"
    if (length := sum(map(len, names)) + len(names) - 1) > MAX_PATH:
        return f"is {length} bytes long, at most {MAX_PATH} are possible"
    return ""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value of a file must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


COUNT = Kind("a whole number of at least 1", lambda x: is_whole(x) and x >= 1)
INDEX = Kind("a whole number of at least 0", lambda x: is_whole(x) and x >= 0)
POSITIVE = Kind("a number above 0", lambda x: is_number(x) and x > 0)
NUMBER = Kind("a number", is_number)
SCALE = Kind("a number other than 0", lambda x: is_number(x) and x != 0)
TEXT = Kind("a text", lambda x: isinstance(x, str))
OBJECT = Kind("a JSON object", lambda x: isinstance(x, dict))


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """A non-empty list, or one of exactly `length`, whose every element is of a kind."""
    return Kind(
        f"a list of {'' if length is None else f'{length} times '}{kind.words}",
        lambda x: isinstance(x, list | tuple) and all(kind.holds(y) for y in x)
        and (len(x) == length if length is not None else len(x) > 0),
    )


def value_problems(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, str]:
    """Key -> what is wrong with its value, for every key of `kinds` that is missing or wrong."""
    problems = {}
    for key, kind in kinds.items():
        if key not in values:
            problems[key] = f"{key}: missing; expected {kind.words}"
        elif not kind.holds(values[key]):
            problems[key] = f"{key}: expected {kind.words}, got {values[key]!r:.60}"
    return problems


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
