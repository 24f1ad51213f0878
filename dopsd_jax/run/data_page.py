"""What `data_check.inspect` found, as one page and as one contact sheet."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from dopsd_jax.core.page import as_image, as_table, document
from dopsd_jax.data import crops
from dopsd_jax.data.datasets import Data, parse_data
from dopsd_jax.run.data_check import Inspection, RowLook, Warned, rows_of_batch

MAX_REFUSED = 200  # refusals that are listed
MAX_SHOWN = 12     # rows shown with a warning; all of them carry it below
CELL, LABEL, GAP = 160, 18, 4  # pixels of the contact sheet
MAX_CELLS = 2000   # of the contact sheet; about 55 million pixels

STYLE = """
h1, .summary td { overflow-wrap: anywhere; } .summary td:first-child { min-width: 4rem; }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr));
        gap: 1rem; }
.row { border: 1px solid #ddd; border-radius: .4rem; padding: .7rem; min-width: 0; }
.row:target { outline: 3px solid #2060c0; } .row.refused { border-color: #a02000; }
.row p, .row ul { margin: .3rem 0; } .row ul { padding-left: 1.1rem; font-size: .9rem; }
.row h3 { margin: .5rem 0 .2rem; overflow-wrap: anywhere; font-weight: 600; font-size: .95rem; }
.several figure { width: calc(50% - .25rem); } .several figcaption { font-size: .8rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-start; }
.facts, .key { color: #555; font-size: .85rem; }
.caption { max-height: 11rem; overflow-y: auto; overflow-wrap: anywhere; white-space: pre-wrap;
           background: #f6f6f6; padding: .3rem .5rem; border-radius: .3rem; font-size: .9rem; }
.strip { display: flex; flex-wrap: wrap; gap: .7rem; align-items: flex-start; }
.strip a { color: inherit; text-decoration: none; width: 9rem; font-size: .8rem; }
.strip img { max-width: 9rem; max-height: 9rem; width: auto; display: block; }
.strip img, .row img { outline: 1px solid #ddd; }
.strip span { display: block; overflow-wrap: anywhere; }
.refusals td { overflow-wrap: anywhere; } .refusals td:first-child { min-width: 9rem; }
.warned { margin: 1.5rem 0; } .warned h3, .warned p { margin: .3rem 0; }
.over { color: #a02000; font-weight: 600; } .good { color: #207030; }
@media (max-width: 40rem) { body { margin: 1rem auto; } th, td { padding-right: .5rem; }
                            .refusals td:first-child { min-width: 5.5rem; } }
"""


def page(config: ConfigDict, found: Inspection) -> str:
    """The page of a run's data: what is wrong, what may be, the buckets, and every row."""
    refusals = found.refusals()
    data = found.data
    total = len(found.data.rows) if data else 0
    sets, _ = parse_data(config.data, config.data_weights)
    parts = [_summary(config, found)]
    if total > len(found.rows):
        parts.append(
            f"<p class=warn>{len(found.rows)} of {total} rows were looked at, evenly spread. What "
            "is said of pictures and captions below is said of these; --limit 0 looks at all.</p>"
        )
        parts += [f"<p class=warn>Of all rows, by their sizes: {html.escape(line)}.</p>"
                  for line in found.of_all]
    parts += ["<h2>What a run refuses</h2>", _refusals(refusals)]
    parts += ["<h2>Warnings</h2>", *map(_warned, found.warned)]
    if not found.warned:
        parts.append("<p class=good>None.</p>")
    if data:
        parts += ["<h2>Buckets</h2>", _buckets(data)]
        parts += [f"<h2>{'Every row' if total == len(found.rows) else 'The rows looked at'}, as "
                  "training sees it</h2>", '<div class="rows">',
                  *(_row(found, row, data) for row in found.rows), "</div>"]
    return _whole(document(f"Data: {', '.join(Path(path).name for path in sets)}", parts, STYLE))


def _whole(text: str) -> str:
    """The text without half surrogates, which stand for bytes of names that are no UTF-8."""
    return text.encode(errors="replace").decode()


def _summary(config: ConfigDict, found: Inspection) -> str:
    data, rows = found.data, [["data", config.data]]
    if data:
        seen = sum(map(len, data.assignment.values()))
        again = "" if seen == len(data.rows) else f", {seen} in an epoch, as folders' names say"
        rows.append(["rows", f"{len(data.rows)}{again}"])
        total = sum(s.weight or 0 for s in data.sets)
        if len(data.sets) > 1:
            rows += [["", f"{s.rows} of {s.path}" + (
                f", {crops.share(s.weight / total)} of the pictures seen" if s.weight else ""
            )] for s in data.sets]
    rows += [["recipe", config.recipe], ["model", config.model],
             ["batch", f"{rows_of_batch(config)} rows of data"]]
    if data and data.keep_prompts:
        counts = " and ".join(str(len(prompts)) for prompts in data.keep_prompts)
        rows.append(["keep_prompts", f"{counts} prompts without a picture"])
    rows.append(["tokens", ", ".join(f"{role} up to {n}" for role, n in found.limits.items())])
    return f'<div class="summary">{as_table(["", ""], rows)}</div>'


def _refusals(refusals: Sequence[tuple[str, str]]) -> str:
    if not refusals:
        return "<p class=good>Nothing.</p>"
    rest = len(refusals) - MAX_REFUSED
    more = f"<p>and {rest} more</p>" if rest > 0 else ""
    return (f'<p class="warn">Correct or remove these; until then no run starts on this data, or '
            'with encode = online it stops where it comes to them.</p><div class="refusals">'
            f'{as_table(["where", "why"], refusals[:MAX_REFUSED])}</div>{more}')


def _warned(warned: Warned) -> str:
    count = f" ({len(warned.rows)} row{'' if len(warned.rows) == 1 else 's'})" if (
        warned.rows) else ""
    links = []
    for note in warned.rows[:MAX_SHOWN]:
        number, where = note.row.number + 1, note.row.row.where
        picture = as_image(note.look.thumbnail, where) if note.look else ""
        links.append(f'<a href="#row{number}">{picture}<span>#{number} {html.escape(where)}</span>'
                     f"<span class=warn>{html.escape(note.words)}</span></a>")
    rest = len(warned.rows) - len(links)
    more = f"<span>and {rest} more, marked below</span>" if rest > 0 else ""
    strip = f'<div class="strip">{"".join(links)}{more}</div>' if links else ""
    return (f"<div class=warned><h3 class=warn>{html.escape(warned.title)}{count}</h3>"
            f"<p>{html.escape(warned.advice)}</p>{strip}</div>")


def _buckets(data: Data) -> str:
    total = sum(map(len, data.assignment.values()))
    rows = [[str(bucket), len(members), crops.share(len(members) / total)]
            for bucket, members in data.assignment.items()]
    return as_table(["width x height", "rows", "of all"], rows)


def _row(found: Inspection, row: RowLook, data: Data) -> str:
    """The card of a row."""
    figures = []
    for image, look in enumerate(row.looks):
        name = row.image_name(image)
        label = f"<figcaption>{name or 'target'}</figcaption>" if len(row.looks) > 1 else ""
        figures.append(f"<figure>{as_image(look.thumbnail, name or row.row.where)}{label}</figure>")
        if look.whole:
            figures.append(f"<figure>{as_image(look.whole, 'what is kept of it')}"
                           "<figcaption>of the whole picture</figcaption></figure>")
    if not row.row.images:
        figures.append("<p class=facts>no picture</p>")
    facts = [f"{row.bucket.width}x{row.bucket.height}"]
    if target := row.target:
        facts[0] += f" from {target.size[0]}x{target.size[1]}"
        facts.append(("enlarged " if target.enlarged >= 1 else "reduced ")
                     + crops.times(target.enlarged) if target.enlarged != 1 else "not resized")
        facts.append(f"{crops.share(target.cut)} cut away" if target.cut else "nothing cut away")
    if row.row.repeats > 1:
        facts.append(f"counts {row.row.repeats} times")
    if row.row.class_name:
        facts.append(f"class {row.row.class_name}")
    said = [f'<li class="warn"><strong>refused:</strong> {html.escape(p)}</li>'
            for p in row.problems]
    said += [f'<li class="warn">{html.escape(w)}</li>' for w in row.warnings]
    captions = [_caption(key, text, row.tokens.get(key, {}), found.limits)
                for key, text in row.row.captions.items()]
    if row.row.enhanced is not None:
        captions.append(_caption("enhanced_prompt", row.row.enhanced, {}, {}))
    return (
        f'<article id="row{row.number + 1}" class="row{" refused" if row.problems else ""}">'
        f'<div class="pictures{" several" if len(row.looks) > 1 else ""}">{"".join(figures)}</div>'
        f"<h3>#{row.number + 1} {html.escape(_where(row, data))}</h3>"
        f'<p class="facts">{html.escape(", ".join(facts))}</p>'
        + (f"<ul>{''.join(said)}</ul>" if said else "") + "".join(captions) + "</article>"
    )


def _where(row: RowLook, data: Data) -> str:
    """Where a row comes from; of several data sets which one."""
    first = 0
    for part in data.sets:
        first += part.rows
        if row.number < first and len(data.sets) > 1:
            return f"{part.path}: {row.row.where}"
    return row.row.where


def _caption(
    key: str, text: str, tokens: dict[str, int | None], limits: dict[str, int]
) -> str:
    counts = []
    for role, count in tokens.items():
        words = f"{role} {'?' if count is None else count} of {limits[role]} tokens"
        over = count is None or count > limits[role]
        counts.append(f'<span class="over">{words}</span>' if over else words)
    told = f"{html.escape(key)}: {', '.join(counts)}" if counts else html.escape(key)
    return f'<p class="key">{told}</p><p class="caption" dir="auto">{html.escape(text)}</p>'


def sheet(found: Inspection) -> Image.Image:
    """The crops side by side, numbered as on the page; rows with a warning have a red frame."""
    step = -(-len(found.rows) // MAX_CELLS) or 1
    rows = found.rows[::step]
    across = min(max(round((len(rows) * 1.4) ** 0.5), 4), max(len(rows), 1))
    down = -(-len(rows) // across) or 1
    width, height = CELL + GAP, CELL + LABEL + GAP
    canvas = Image.new("RGB", (across * width + GAP, down * height + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for i, row in enumerate(rows):
        x, y = GAP + i % across * width, GAP + i // across * height
        marked = row.problems or row.warnings
        if row.target:
            with Image.open(io.BytesIO(row.target.thumbnail)) as picture:
                picture = picture.convert("RGB")
            # Small crops are enlarged by whole pixels, so that they can be seen.
            factor = max(CELL // max(picture.size), 1)
            picture = picture.resize((picture.width * factor, picture.height * factor), 0)
            picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            canvas.paste(picture, (x + (CELL - picture.width) // 2,
                                   y + (CELL - picture.height) // 2))
        else:
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill="#eee")
        if marked:
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline="#d03000", width=3)
        draw.text((x, y + CELL + 2), _label(row), font=font, fill="#d03000" if marked else "black")
    return canvas


def _label(row: RowLook) -> str:
    words = f"#{row.number + 1}  {row.bucket.width}x{row.bucket.height}"
    if row.target and row.target.enlarged > 1:
        words += f"  x{crops.times(row.target.enlarged).split()[0]}"
    if row.target and row.target.cut >= 0.01:
        words += f"  -{row.target.cut:.0%}"
    return words


def summary(found: Inspection) -> list[str]:
    """The same in a few lines for the terminal."""
    refusals = found.refusals()
    lines = [f"refused: {where}: {why}" for where, why in refusals[:10]]
    if len(refusals) > 10:
        lines.append(f"refused: and {len(refusals) - 10} more")
    for warned in found.warned:
        which = ""
        if warned.rows:
            worst = warned.rows[0]
            which = (f": {len(warned.rows)} of {len(found.rows)} rows; {worst.row.row.where}, "
                     f"{worst.words}")
        lines.append(f"warning: {warned.title}{which}")
    return [_whole(line) for line in (*lines, *(f"warning: {line}" for line in found.of_all))]
