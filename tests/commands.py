"""Commands of the package as children of a test."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a command; XLA_FLAGS are added to those of the test run."""
    flags = f"{more.pop('XLA_FLAGS', '')} {os.environ.get('XLA_FLAGS', '')}".strip()
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **more}
