"""The project's own log: plain lines on stderr, without the libraries' chatter."""

from __future__ import annotations

import logging
import sys

from absl import logging as absl_logging

log = logging.getLogger("dopsd_jax")


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
