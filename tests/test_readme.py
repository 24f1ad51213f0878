"""The commands of README and docs, run as printed on the tiny pipeline under the real names."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from dopsd_jax.core.metrics import read_metrics
from dopsd_jax.run.workdir import flat_config
from tests import commands
from tests.commands import environment, wrong_flags
from tests.weights.one_file_examples import example, z_image_of_its_makers

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Only sizes change, so that it takes seconds: one small shape, two updates.
SMALLER = {
    "dopsd_jax.data": ["--config.buckets=64x64", "--config.lora.rank=4"],
    "dopsd_jax.train": [
        "--config.buckets=64x64", "--config.num_train_steps=2", "--config.sample_every=1",
        "--config.lora.rank=4", "--config.text_tokens=128", "--config.teacher_tokens=672",
    ],
    "dopsd_jax.sample": ["--num_steps=2", "--height=64", "--width=64"],
    "dopsd_jax.export": [], "dopsd_jax.report": [],
}
SMALLER_FLUX2 = SMALLER | {"dopsd_jax.train": [
    "--config.buckets=64x64", "--config.num_train_steps=2", "--config.sample_every=0",
    "--config.lora.rank=4", "--config.batch_size=2", "--config.preflight=off",
]}


def block(mark: str) -> str:
    (found,) = re.findall(rf"<!-- {mark} -->\n```\w*\n(.*?)```",
                          "\n".join(page.read_text() for page in PAGES), re.S)
    return found


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory):
    """A folder with what the README says you need, and the commands already run in it."""
    home = tmp_path_factory.mktemp("home")
    (home / "Z-Image-Turbo").symlink_to(tiny.pipeline)
    (home / "Qwen3-VL-4B-Instruct").symlink_to(tiny.vlm)
    (home / "configs").symlink_to(ROOT / "configs")
    (home / "photos").mkdir()
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(photographs, name)()).save(home / "photos" / f"{name}.png")
        (home / "photos" / f"{name}.txt").write_text(f"a photograph of {name}\n")
    run_block(home, "tested", SMALLER)
    return home


def run_block(home, mark, smaller):
    for line in block(mark).strip().splitlines():
        python, _, module, *rest = shlex.split(line)
        assert python == "python"
        run(home, module, *changed(rest, smaller[module]))


def changed(args, changes):
    """Arguments with other values of some flags, each of which stands once."""
    names, kept, rest = {c.split("=")[0] for c in changes}, [], iter(args)
    for arg in rest:
        if arg in names:
            next(rest)  # its value
        elif arg.split("=")[0] not in names:
            kept.append(arg)
    return [*kept, *changes]


def run(home, module, *args):
    done = commands.run(module, *args, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_commands_train_sample_and_export(home):
    assert "photos/" not in (page := (home / "runs/data/data.html").read_text())
    assert "a photograph of chelsea" in page and (home / "runs/data/data.png").is_file()
    assert (home / "runs/a/samples/step_000002.png").is_file()
    (picture,) = (home / "runs/a/drawn").glob("*.png")
    assert np.asarray(Image.open(picture)).shape == (64, 64, 3)
    assert (home / "runs/a/lora.safetensors").stat().st_size > 10_000
    assert "<html" in (home / "runs/a/report.html").read_text()


def test_the_commands_of_the_other_family_train_edit_and_export(tiny_flux2, tmp_path):
    (tmp_path / "FLUX.2-klein-4B").symlink_to(tiny_flux2)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos").mkdir()
    edits = []
    for name in ("astronaut", "chelsea"):
        Image.fromarray(getattr(photographs, name)()).save(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.txt").write_text(f"a photograph of {name}\n")
        edits.append({"image_paths": ["house.png", f"photos/{name}.png"], "caption": "change it"})
    Image.fromarray(photographs.coffee()).save(tmp_path / "house.png")
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, edits)))
    run_block(tmp_path, "tested flux2", SMALLER_FLUX2)
    assert (tmp_path / "runs/b/checkpoints/2").is_dir()
    (picture,) = (tmp_path / "runs/e/drawn").glob("*.png")
    assert np.asarray(Image.open(picture)).std() > 5
    assert (tmp_path / "runs/e/lora.safetensors").stat().st_size > 10_000


def test_the_commands_train_and_sample_with_files_of_comfyui(home, tiny):
    model = example(tiny.pipeline, z_image_of_its_makers, home)
    (home / "Tongyi-MAI").mkdir()
    model.small.rename(home / "Tongyi-MAI" / "Z-Image-Turbo")
    files = model.files(home, "short")
    for key, name in (("transformer_file", "z_image_turbo_bf16"), ("vae_file", "ae"),
                      ("text_encoder_file", "qwen_3_4b")):
        Path(files[key]).rename(home / f"{name}.safetensors")
    run_block(home, "tested one file", SMALLER)
    # The same weights as of the directory, so the same run, wherever it drew them from.
    losses = [[row["loss"] for row in read_metrics(home / f"runs/{name}")] for name in "ac"]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    (made,) = (home / "runs/c/drawn").glob("*.json")
    assert json.loads(made.read_text())["vae_file"] == "ae.safetensors"


def test_the_python_lines_draw_with_the_lora(home):
    code = block("tested python").replace("512", "64") + "print(pixels.dtype, pixels.shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=environment(),
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "uint8 (1, 64, 64, 3)" in done.stdout, done.stderr


def test_the_readme_is_for_someone_with_two_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, heading = target.partition("#")
        to = page if not file else page.parent / file
        assert to.exists(), f"{page.name}: {target}"
        headings = re.findall(r"^#+ (.*)$", to.read_text(), re.M) if heading else []
        slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not heading or heading in slugs, f"{page.name}: {target}"


def test_every_page_is_listed_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_has_a_module_and_its_flags_exist(page):
    assert wrong_flags(page.read_text()) == []


def test_the_map_names_every_module_and_no_other():
    package = ROOT / "dopsd_jax"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")
               if path.name != "__init__.py"}
    named = re.findall(r"^\| `([\w/]+\.py)` \|", (ROOT / "docs" / "map.md").read_text(), re.M)
    assert set(named) == modules and len(named) == len(modules)


def test_every_file_and_key_that_the_pages_name_exists():
    pages = [*PAGES, *sorted((ROOT / "docs").glob("*.ipynb"))]
    text = "\n".join(page.read_text() for page in pages)
    for path in re.findall(r"(?:launch|configs)/\w+\.\w+", text):
        assert (ROOT / path).is_file(), path
    from configs import mini_claim, mini_continual
    from configs.common import base

    configs = (base(), mini_claim.get_config(), mini_continual.get_config())
    keys = {key for config in configs for key in flat_config(config.to_dict())}
    for key in re.findall(r"--config\.([\w.]+)=", text):
        assert key in keys, key


def test_scripts_and_ci_run_the_same_tests():
    assert "bash launch/test.sh" in (ROOT / ".ci" / "run").read_text()
    for script in (ROOT / "launch").glob("*.sh"):
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
