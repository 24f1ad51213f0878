"""The project's own log: plain lines on stderr, without the libraries' chatter."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from absl import logging as absl_logging

log = logging.getLogger("dopsd_jax")
EVERY_S = 10.0
T = TypeVar("T")


def show() -> None:
    """Prints the project's lines; of the libraries' only errors.

    Orbax logs through absl and warns of what is normal here, such as opening read-only.
    """
    absl_logging.set_verbosity(absl_logging.ERROR)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def counted(items: Iterable[T], total: int, what: str, *, each: int = 1) -> Iterator[T]:
    """The items; on the way a line every 10 seconds says how much is done, and the time left.

    Args:
        items: Each stands for `each` things.
        total: How many things there are.
        what: Their name, such as "pictures".
    """
    began = logged = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - logged > EVERY_S:
            logged, rate = now, done * each / (now - began)
            left = (total - done * each) / rate
            log.info("%d of %d %s, %.3g/s, %.0f s left", done * each, total, what, rate, left)
        yield item
