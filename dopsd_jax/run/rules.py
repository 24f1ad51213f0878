"""What the value of a key must be, in words and as a test."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from dopsd_jax.core import trackers
from dopsd_jax.core.checks import is_number, is_whole, path_problem
from dopsd_jax.method import flow
from dopsd_jax.weights.pipeline import DTYPES

MAX_INT32 = 2**31 - 1  # steps are counted in int32
MAX_TOKENS = 32_768    # more than any of these text encoders was trained with
MAX_PIXELS = 4096**2   # up to which Qwen3-VL's own image processor goes
MAX_RANK = 16_384      # wider than the layers of any published model; a known model says more
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test, which any object may be given to."""

    words: str
    holds: Callable[[Any], bool]


def one_of(*allowed: str) -> Rule:
    return Rule(f"one of {allowed}", lambda x: x in allowed)


def whole(low: int, high: int, what: str = "") -> Rule:
    return Rule(f"a whole number from {low} to {high}{what}",
                lambda x: is_whole(x) and low <= x <= high)


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


def _are_texts(x: Any) -> bool:
    return isinstance(x, list | tuple) and all(map(_is_text, x))


def _is_path(x: Any) -> bool:
    return _is_text(x) and not path_problem(x)


def _are_trackers(x: Any) -> bool:
    try:
        return _is_text(x) and trackers.parse(x) is not None
    except ValueError:
        return False


_POSSIBLE = "of at most 3000 bytes, each name in it of at most 255"
COUNT = whole(1, MAX_INT32)
COUNT_OR_NONE = whole(0, MAX_INT32)
NUM_STEPS = Rule(f"1 to {flow.MAX_STEPS} denoiser calls",
                 lambda x: is_whole(x) and 1 <= x <= flow.MAX_STEPS)
BATCH = whole(1, 2**20)
PIXELS = whole(1, MAX_PIXELS)
PARTS = Rule("a whole number from 1 to 1048576, or -1 for what is left",
             lambda x: is_whole(x) and (x == -1 or 1 <= x <= 2**20))
TOKENS = Rule(f"a multiple of 32, from 32 to {MAX_TOKENS}",
              lambda x: is_whole(x) and 32 <= x <= MAX_TOKENS and x % 32 == 0)
POSITIVE = Rule("a number above 0 that float32 holds",
                lambda x: is_number(x) and SMALLEST <= x <= LARGEST)
NOT_NEGATIVE = Rule("0 or a number above it that float32 holds",
                    lambda x: is_number(x) and (x == 0 or SMALLEST <= x <= LARGEST))
DECAY = Rule("a number in [0, 1) that float32 does not round to 1",
             lambda x: is_number(x) and 0 <= x < 1 and np.float32(x) < 1)
SHARE = Rule("a number in [0, 1]", lambda x: is_number(x) and 0 <= x <= 1)
SEED = Rule("a whole number in [0, 2^32)", lambda x: is_whole(x) and 0 <= x < 2**32)
SWITCH = Rule("True or False", lambda x: isinstance(x, bool))
TEXT = Rule("a text", _is_text)
TEXTS = Rule("texts", _are_texts)
TARGETS = Rule("a text or texts", lambda x: _is_text(x) or _are_texts(x))
PATH = Rule(f"a path {_POSSIBLE}", lambda x: _is_path(x) and x != "")
PATHS = Rule(f"paths {_POSSIBLE}",
             lambda x: _is_text(x) and x != "" and all(map(_is_path, x.split(","))))
ANY_PATH = Rule(f"nothing or a path {_POSSIBLE}", _is_path)
DATA_SETS = Rule(f"nothing, or paths {_POSSIBLE}, with ; and , between them",
                 lambda x: _is_text(x) and all(map(_is_path, re.split("[;,]", x))))
LORAS = Rule(
    f"nothing, or PATH or PATH:STRENGTH between commas, each a path {_POSSIBLE}",
    lambda x: _is_text(x) and all(map(_is_path, x.split(","))),
)
TRACKERS = Rule(f"nothing, or {' or '.join(trackers.TRACKERS)}, or both with a comma between",
                _are_trackers)
DTYPE = one_of(*DTYPES)
KEPT_DTYPE = one_of("float32", "bfloat16")
