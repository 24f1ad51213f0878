"""Commands of the package as children of a test."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of XLA's CPU compiler: half the compile time. What such commands compute is compared among them.
QUICK = "--xla_backend_optimization_level=0"


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a command that trains or draws, compiled in half the time."""
    flags = f"{more.pop('XLA_FLAGS', '')} {QUICK}".strip()
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **more}
