"""The page of a run: whole, self-contained, and without an error in a browser."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dopsd_jax import report
from dopsd_jax.core.metrics import Metrics, draw_curves, read_metrics
from dopsd_jax.run import preflight
from tests import commands

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)


def pixels(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What a run leaves, written by hand; a report reads files and needs no model."""
    workdir = tmp_path_factory.mktemp("report") / "my <run>"
    (workdir / "samples").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({
        "model": "mini", "trainable": "lora", "teacher": "ema", "data": "photos <&>",
        "lora": {"rank": 4, "alpha": 8.0}, "num_train_steps": 20, "sample_prompts": ["<b>bold</b>"],
    }))
    metrics = Metrics(workdir, 0)
    for step in range(1, 21):
        metrics.scalars(step, {"loss": 1 / step, "step_loss": [1 / step, 2 / step]})
        if step % 10 == 0:
            metrics.gauges(step, {"style": 30.0 - step, "drift": 0.5 * step,
                                  "sharpness_ratio": 1.1 - step / 40})
    metrics.close()
    for step in (0, 10, 20):
        for name in ("step", "trajectory", "prompts", "gauge"):
            Image.fromarray(pixels(step, (40, 90, 3))).save(
                workdir / "samples" / f"{name}_{step:06d}.png")
        if step:
            (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    drawn, targets = (pixels(i, (4, 32, 32, 3)) for i in range(2))
    preflight.write(workdir, preflight.compare(drawn, drawn, targets))
    Image.fromarray(pixels(9, (40, 90, 3))).save(workdir / "samples" / "preflight.png")
    return workdir


class Reader(html.parser.HTMLParser):
    """Every tag with its attributes, and that all are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_every_part_and_its_pictures_can_be_decoded(workdir):
    read = Reader(report.page(workdir))
    text = " ".join(read.text)
    for part in ("step 20 of 20", "Preflight", "THE TEACHER HAS NOTHING TO TEACH", "Before and",
                 "The trajectory", "Retention", "Curves", "Checkpoints", "Config", "photos <&>",
                 "<b>bold</b>"):
        assert part in text, part
    images = [a["src"] for tag, a in read.tags if tag == "img"]
    assert len(images) == 1 + 2 + 2 + 1 + 1 + 2 + 1  # preflight .. two kinds of curves
    for source in images:
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert np.asarray(Image.open(io.BytesIO(data))).std() > 1
    captions = re.findall(r"after (\d+) updates", text)
    assert captions == ["0", "20", "0", "20", "20", "0", "20"]


def test_nothing_is_loaded_from_elsewhere_and_no_script_runs(workdir):
    read = Reader(report.page(workdir))
    assert not [t for t, _ in read.tags if t in {"script", "iframe", "object"}]
    links = [v for _, a in read.tags for k, v in a.items() if k in ("src", "href")]
    assert links and all(v.startswith("data:") for v in links)


def test_the_best_checkpoint_is_the_marked_row(workdir):
    table = report._checkpoints(workdir)
    (row,) = re.findall(r"<tr class=best>(.*?)</tr>", table)
    assert row.startswith("<td class=number>10</td>")  # at 20 it is only 0.6 as sharp


def test_a_young_run_has_a_page_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(
        {"model": "m", "trainable": "lora", "teacher": "ema", "lora": {}}))
    (tmp_path / "identity.json").write_text("{}")
    read = Reader(report.page(tmp_path))
    assert "None yet." in " ".join(read.text)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", "x", '{"teaches": 1, "words": []}', "[" * 9999]
)
def test_a_preflight_file_of_something_else_is_named(tmp_path, text):
    (tmp_path / preflight.FILE).write_text(text)
    with pytest.raises(ValueError, match=r"preflight.json: expected a JSON object with teaches"):
        preflight.read(tmp_path)


@pytest.mark.parametrize("value", ["null", "{}", '"x"', "[]", "[1, null]", "true"])
def test_numbers_that_are_none_are_named_by_line(tmp_path, value):
    rows = ['{"step": 1, "loss": 2}', f'{{"step": 2, "loss": {value}}}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: expected a number or a list of"):
        read_metrics(tmp_path)


def test_curves_of_a_run_whose_vectors_changed_their_length_are_drawn():
    rows = [{"step": 1, "step_loss": [1.0, 2.0]}, {"step": 2, "step_loss": [1.0, 2.0, 3.0]},
            {"step": 3, "step_loss": [1.5, 2.0, float("nan")]}]
    (ax, *_) = draw_curves(rows).axes
    assert [list(line.get_xdata()) for line in ax.lines] == [[2, 3]] * 3


def test_the_command_writes_the_page_and_refuses_what_is_no_run(workdir, tmp_path):
    def run(*args):
        return commands.run("dopsd_jax.report", *args)

    done = run("--workdir", str(workdir), "--out", str(tmp_path / "page.html"))
    assert done.returncode == 0 and str(tmp_path / "page.html") in done.stdout, done.stderr
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    done = run("--workdir", str(tmp_path))
    assert done.returncode == 1 and "error:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt install chromium")
def test_a_browser_draws_it_without_an_error(workdir, tmp_path):
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    page.write_text(report.page(workdir))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000",
         f"--screenshot={shot}", page.as_uri()],
        capture_output=True, text=True, timeout=1800, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    # The random pictures stand out of a page that is white with black text.
    colourful = np.ptp(seen, axis=-1) > 60
    assert colourful.sum() > 10_000
