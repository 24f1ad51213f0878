"""Commands of the package as children of a test."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a command; XLA_FLAGS are added to those of the test run."""
    flags = f"{more.pop('XLA_FLAGS', '')} {os.environ.get('XLA_FLAGS', '')}".strip()
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **more}


def wrong_flags(text: str) -> list[str]:
    """Commands in a text whose module is missing, and their flags that it does not define."""
    wrong = []
    text = re.sub(r"\\\n\s*", " ", text)
    for module, rest in re.findall(r"python -m (dopsd_jax[\w.]*)([^`\n]*)", text):
        path = ROOT.joinpath(*module.split("."))
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.is_file():
            wrong.append(module)
            continue
        # What defines flags of several commands.
        shared = ("core/distributed.py", "compare/metric_weights.py", "compare/command.py",
                  "run/model.py")
        sources = "".join(p.read_text() for p in (file, *(ROOT / "dopsd_jax" / s for s in shared)))
        wrong += [
            f"{module} --{flag}" for flag in re.findall(r"--([a-z]\w*)(?![\w.])", rest)
            if not re.search(rf'"(--)?{flag}"', sources)
        ]
    return wrong
