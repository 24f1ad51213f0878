"""A page that holds all of itself: pictures are inside, nothing is loaded, no script runs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; image-rendering: auto; }
.pixels img { image-rendering: pixelated; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left;
       vertical-align: top; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; }
h3 { font-size: 1rem; } .wide { overflow-x: auto; } .wide td { white-space: nowrap; }
figcaption { color: #555; font-size: .9rem; } .warn { color: #a02000; } .best { font-weight: 600; }
"""


def as_image(file: bytes, alt: str) -> str:
    """An <img> that holds its picture, a PNG or JPEG file."""
    code = base64.b64encode(file).decode()
    with Image.open(io.BytesIO(file)) as image:
        (width, height), kind = image.size, image.get_format_mimetype()
    return (f'<img src="data:{kind};base64,{code}" width="{width}" height="{height}" '
            f'alt="{html.escape(alt)}">')


def as_table(head: Sequence[str], rows: Sequence[Sequence[Any]], marked: int | None = None) -> str:
    """An HTML table; numbers stand to the right; the row `marked` is bold."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    for i, row in enumerate(rows):
        cells = []
        for value in row:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            cells.append(f"<td{' class=number' if number else ''}>{html.escape(text)}</td>")
        lines.append(f"<tr{' class=best' if i == marked else ''}>{''.join(cells)}</tr>")
    return "\n".join(lines) + "</table>"


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole page.

    Args:
        title: Plain text, its heading too.
        parts: HTML, in order.
        style: CSS after that of all pages.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}{style}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(parts) + "\n</body></html>\n"
    )
