"""Command: one word for all others, `dopsd train ..` or `python -m dopsd_jax train ..`."""

from __future__ import annotations

import ast
import difflib
import os
import runpy
import sys
from pathlib import Path

COMMANDS = (
    "train", "data", "tasks", "sample", "encode", "export", "evaluate", "continual", "score",
    "paired", "plan", "report", "demo", "quickstart", "completion",
)


def described(command: str) -> tuple[str, str]:
    """What a command does and an example, from its docstring, without importing it."""
    source = Path(__file__).with_name(f"{command}.py")
    if not source.is_file():
        source = Path(__file__).with_name(command) / "__main__.py"
    lines = (ast.get_docstring(ast.parse(source.read_text()), clean=False) or "").splitlines()
    words = lines[0].partition(": ")[2].rstrip(".")
    start = next(i for i, line in enumerate(lines) if line.startswith("    python -m "))
    example = lines[start]
    while example.endswith("\\"):
        start += 1
        example = example.removesuffix("\\") + lines[start]
    example = " ".join(example.split())
    example = example.replace(f"python -m dopsd_jax.{command}", f"dopsd {command}")
    return words[:1].upper() + words[1:], example


def overview() -> str:
    """All commands, each with an example."""
    parts = ["dopsd COMMAND [FLAGS]; dopsd COMMAND --help lists its flags.", ""]
    for command in COMMANDS:
        words, example = described(command)
        parts += [f"{command:11} {words}", f"    {example}", ""]
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Runs the command that the first argument names, with the others.

    Raises:
        SystemExit: No such command, with the nearest one; and as the command does.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "help" and rest:
        command, *rest = rest[0], "--help"
    if command in ("--help", "-h", "help"):
        print(overview())
        return
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SystemExit(
            f"error: {command}: no such command; {hint}there are {', '.join(COMMANDS)}"
        )
    # As with python -m: config files import `configs` of the folder that the command runs in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    sys.argv = [f"dopsd {command}", *rest]
    runpy.run_module(f"dopsd_jax.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
