"""Command: a run's directory -> one page that holds everything, to keep or to send.

    python -m dopsd_jax.report --workdir runs/a

Of a comparison's directory (dopsd_jax.evaluate) the page has its tables, curves and pictures; of a
sequence's (dopsd_jax.tasks) what was kept of every task, and pictures of each.

Writes <workdir>/report.html, or --out: pictures and curves are inside it, nothing is loaded from
elsewhere and no script runs. May be called while the run goes on.
"""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import Any

from absl import flags

from dopsd_jax.core import cli, mirror
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.metrics import GAUGES, draw_curves, read_metrics
from dopsd_jax.core.page import as_image, as_table, document
from dopsd_jax.run import gauges, preflight
from dopsd_jax.run import workdir as workdir_lib

FLAGS = flags.FLAGS
TABLE = "table.md"  # of a comparison, see evaluate
TASKS = "tasks.md"  # of a sequence, see tasks

def steps_of(samples: Path, name: str) -> dict[int, Path]:
    """Pictures samples/<name>_N.png by step, in order."""
    found = {
        int(match[1]): file for file in samples.glob(f"{name}_*.png")
        if (match := re.fullmatch(rf"{name}_(\d+)\.png", file.name))
    }
    return dict(sorted(found.items()))


def _curves(rows: list[dict[str, Any]]) -> str:
    figure = draw_curves(rows)
    if figure is None:
        return "<p>None yet.</p>"
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return as_image(out.getvalue(), "curves")


def _figures(files: dict[str, Path]) -> str:
    shown = [
        f"<figure>{as_image(file.read_bytes(), caption)}<figcaption>{html.escape(caption)}"
        "</figcaption></figure>" for caption, file in files.items()
    ]
    return f'<div class="side pixels">{"".join(shown)}</div>'


def _first_and_last(samples: Path, name: str) -> str:
    steps = steps_of(samples, name)
    if not steps:
        return ""
    ends = dict.fromkeys((min(steps), max(steps)))
    return _figures({f"after {step} updates": steps[step] for step in ends})


def _preflight(workdir: Path) -> str:
    file = workdir / preflight.FILE
    if not file.is_file():
        return ""
    found = preflight.read(workdir)
    kind = "" if found["teaches"] else ' class="warn"'
    words = "".join(f"<li{kind}>{html.escape(w)}</li>" for w in found["words"])
    picture = workdir / "samples" / "preflight.png"
    shown = _figures({"before the run, same noise in every row": picture}) if (
        picture.is_file()) else ""
    return f"<h2>Preflight: has the teacher anything to teach?</h2><ul>{words}</ul>{shown}"


def _checkpoints(workdir: Path, *, moved: bool = False) -> str:
    rows = {r["step"]: r for r in read_metrics(workdir)}
    gauge_rows = {r["step"]: r for r in read_metrics(workdir, GAUGES)}
    saved = workdir_lib.saved_steps(workdir)
    if not saved:
        return "<p>None yet.</p>"
    names = list(dict.fromkeys(k for r in gauge_rows.values() for k in r if k != "step"))
    table = [
        [s, rows.get(s, {}).get("loss", ""), *(gauge_rows.get(s, {}).get(n, "") for n in names)]
        for s in saved
    ]
    best = gauges.best_checkpoint(list(gauge_rows.values()), saved, moved=moved)
    note = "" if best is None else (
        "<p>Bold: the best one, whose style is nearest to the targets' among those with at least "
        f" {gauges.MIN_SHARPNESS:g} of the untuned model's sharpness"
        f"{', both on preview_model' if moved else ''}.</p>"
    )
    marked = None if best is None else saved.index(best["step"])
    return as_table(["step", "loss", *(n.replace("_", " ") for n in names)], table, marked) + note


def _config(config: dict[str, Any]) -> str:
    values = workdir_lib.flat_config(config)
    return as_table(["key", "value"], [[k, json.dumps(v)] for k, v in sorted(values.items())])


def page(workdir: str | Path) -> str:
    """The page of a run.

    Raises:
        ValueError: Not a run's directory.
    """
    workdir = Path(workdir)
    config = workdir_lib.read_config(workdir)
    rows, gauge_rows = read_metrics(workdir), read_metrics(workdir, GAUGES)
    step, total = (rows[-1]["step"] if rows else 0), config.get("num_train_steps", "?")
    samples = workdir / "samples"
    last = list(steps_of(samples, "trajectory").items())[-1:]
    trajectory = _figures({f"student above teacher, after {n} updates": f for n, f in last})
    title = f"{workdir.resolve().name}: step {step} of {total}"
    told_curves = (
        "<p>Drift: distance of pictures of unrelated prompts to the untuned model's, on the same "
        "noise, in levels of 255. Sharpness ratio: theirs to the untuned model's. Style: distance "
        f"of colours to the targets'.</p>{_curves(gauge_rows)}"
        if gauge_rows else "<p>None yet.</p>"
    )
    return document(title, [
        as_table(["", ""], [
            ["model", config["model"]], ["data", config.get("data", "")],
            ["objective", config.get("objective", "dopsd")], ["teacher", config["teacher"]],
            ["trainable", config["trainable"]],
        ]),
        _preflight(workdir),
        "<h2>Before and after, same noise</h2>", _first_and_last(samples, "step"),
        _first_and_last(samples, "prompts"),
        "<h2>The trajectory: the clean estimate at every step</h2>", trajectory,
        "<h2>Retention: prompts that have nothing to do with the data</h2>", told_curves,
        _first_and_last(samples, "gauge"),
        _moved(samples, config.get("preview_model", "")),
        "<h2>Curves</h2>", _curves(rows),
        "<h2>Checkpoints</h2>", _checkpoints(workdir, moved=bool(config.get("preview_model"))),
        "<h2>Config</h2>", _config(config),
    ])


def _moved(samples: Path, model: str) -> str:
    """What was drawn on another model, if anything."""
    shown = "".join(_first_and_last(samples, gauges.MOVED + name)
                    for name in ("step", "prompts", "gauge"))
    if not shown:
        return ""
    return (f"<h2>The same LoRA on preview_model, {html.escape(model)}</h2><p>Same noise and "
            f"prompts, that model's own steps; base is that model without the LoRA.</p>{shown}")


def _from_markdown(text: str) -> str:
    """Headings, tables and paragraphs of a table file as HTML."""
    parts = []
    for block in text.strip().split("\n\n"):
        lines = block.strip().splitlines()
        if lines[0].startswith("|"):
            cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
            parts.append(f'<div class="wide">{as_table(cells[0], cells[2:])}</div>')
        elif lines[0].startswith("#"):
            parts.append(f"<h3>{html.escape(lines[0].lstrip('# '))}</h3>")
        else:
            parts.append(f"<p>{html.escape(block)}</p>")
    return "\n".join(parts)


def evaluation_page(workdir: str | Path) -> str:
    """The page of a comparison, see evaluate and continual."""
    workdir = Path(workdir)
    pictures = {
        "old prompts kept, and new styles learned": "curves.png",
        "new styles, then old prompts, by method; each from one noise": "grid.png",
    }
    shown = [
        f"<h2>{html.escape(words[:1].upper() + words[1:])}</h2>"
        f"{as_image((workdir / name).read_bytes(), words)}"
        for words, name in pictures.items() if (workdir / name).is_file()
    ]
    return document(f"{workdir.resolve().name}: methods compared", [
        *shown, "<h2>Figures, with 95% intervals</h2>",
        _from_markdown((workdir / TABLE).read_text()),
    ])


def tasks_page(workdir: str | Path) -> str:
    """The page of a sequence of tasks, see tasks: its table, and the last pictures of each."""
    workdir = Path(workdir)
    parts = ["<h2>What was learned and kept</h2>", _from_markdown((workdir / TASKS).read_text())]
    runs = {int(p.name.partition("_")[0]): p for p in workdir.iterdir()
            if re.fullmatch(r"\d+_.+", p.name) and (p / "samples").is_dir()}
    for number, run in sorted(runs.items()):
        name = run.name.partition("_")[2]
        last = {"its own prompts": "step", "unrelated prompts": "gauge"} | {
            f"prompts of {runs[i].name.partition('_')[2]}": f"earlier{i}" for i in range(1, number)
        }
        files = {words: list(steps_of(run / "samples", kind).values())[-1:]
                 for words, kind in last.items()}
        parts += [f"<h2>After task {number}, {html.escape(name)}</h2>",
                  _figures({words: found[0] for words, found in files.items() if found})]
    return document(f"{workdir.resolve().name}: {len(runs)} tasks", parts)


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    flags.DEFINE_string("out", None, "The page; default: report.html in the run's directory.")


def main() -> None:
    workdir = mirror.local_copy(FLAGS.workdir)
    out = Path(FLAGS.out) if FLAGS.out else workdir / "report.html"
    pages = {TABLE: evaluation_page, TASKS: tasks_page}
    make = next((make for file, make in pages.items() if (workdir / file).is_file()), page)
    text = make(workdir)
    write_atomic(out, text)
    print(f"{out} ({len(text) / 2**20:.1f} MiB)")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)
