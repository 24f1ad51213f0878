"""Tables in Markdown, and texts of users that must not act as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def markdown_table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table of named rows, a cell for each column."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """A text in one line that is shown as it is: no emphasis, link, HTML or entity."""
    return re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """A text in one line as code, backticks in it included."""
    text = " ".join(text.split())
    ticks = "`" * (1 + _longest(text))
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def fenced(text: str, language: str = "") -> str:
    """A text of several lines as a block of code, that no line of it ends."""
    fence = "`" * max(3, 1 + _longest(text))
    return f"{fence}{language}\n{text}\n{fence}"


def _longest(text: str) -> int:
    """How many backticks follow each other at most."""
    return max(map(len, re.findall("`+", text)), default=0)
