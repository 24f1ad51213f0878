"""Base and tuned on the same prompts and noise: one run of the command, and what may follow it."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dopsd_jax import paired, sample, weights
from dopsd_jax.compare import paired as figures
from dopsd_jax.compare import scores
from dopsd_jax.compare.paired import Measured
from dopsd_jax.compare.stats import mean_interval
from dopsd_jax.core import trees
from dopsd_jax.weights import lora_files
from dopsd_jax.weights.shapes import transformer_shapes
from tests import commands

PROMPTS = ["a red fox", "the sea", "snow"]  # of one padded length: fewer programs to compile
SIZE = dict(num_steps=2, height=32, width=48, dtype="float32")
PIXELS = {k: v for k, v in SIZE.items() if k != "dtype"}


@pytest.fixture(scope="module")
def pipe(tiny):
    return weights.load_pipeline(tiny.pipeline, dtype="float32")


@pytest.fixture(scope="module")
def lora(pipe, tmp_path_factory):
    """A LoRA file large enough that pictures differ."""
    rng, flat = np.random.default_rng(0), {}
    for name, x in trees.flatten(transformer_shapes(pipe.denoiser.network)).items():
        if "/attention/" in name and name.endswith("/kernel"):
            path, (*stack, fan_in, fan_out) = name.removesuffix("/kernel"), x.shape
            flat[f"{path}/a"] = rng.standard_normal((*stack, fan_in, 2), np.float32) / 4
            flat[f"{path}/b"] = rng.standard_normal((*stack, 2, fan_out), np.float32)
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    lora_files.save_diffusers(
        file, trees.unflatten(flat), lora_files.LoraSpec(2, 2.0), pipe.lora.modules)
    return str(file)


@pytest.fixture(scope="module")
def options(metric_weights):
    return {kind: metric_weights / kind for kind in ("clip", "lpips", "hpsv2")}


@pytest.fixture(scope="module")
def done(tiny, lora, options, tmp_path_factory):
    """(workdir, what the command printed); nothing in it may be changed."""
    folder = tmp_path_factory.mktemp("paired")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "", PROMPTS[0]]))
    ran = commands.run(
        "dopsd_jax.paired", f"--model={tiny.pipeline}", f"--lora={lora}:0.5",
        f"--prompts={folder}/prompts.txt", "--seeds=2", "--seed=5", "--batch=4",
        f"--workdir={folder}/w", *(f"--{k}={v}" for k, v in (SIZE | options).items()),
    )
    assert ran.returncode == 0, ran.stderr
    assert "3 prompts, 2 seeds each: 6 pairs" in ran.stderr
    return folder / "w", ran.stdout


@pytest.fixture
def copy(done, tmp_path):
    """The run's directory, to be changed at will."""
    return shutil.copytree(done[0], tmp_path / "w")


@pytest.fixture
def plan(tiny, lora, tmp_path):
    """plan(workdir, prompts, ..) of the run, with changes."""
    def make(workdir, prompts=PROMPTS, *, lora=f"{lora}:0.5", seeds=2, **changes):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        return paired.planned(
            workdir, str(tiny.pipeline), None, [lora], str(tmp_path / "prompts.txt"),
            first_seed=5, seeds=seeds, **{**SIZE, **changes},
        )

    return make


def test_both_sides_are_what_sample_draws_of_the_seed(done, pipe, lora):
    for side, added in (("base", None), ("tuned", [(lora, 0.5)])):
        alone = sample.generate(pipe, [PROMPTS[1]] * 4, seed=5, lora=added, **PIXELS)
        for seed in (5, 6):
            file = done[0] / side / f"0001_{seed}.png"
            apart = np.asarray(Image.open(file), int) - alone[seed - 5]
            assert np.abs(apart).mean() < 0.2 and np.abs(apart).max() < 6
            made = json.loads(file.with_suffix(".json").read_text())
            assert (made["prompt"], made["seed"]) == (PROMPTS[1], seed)
            assert made["lora"] == ([f"{lora}:0.5"] if added else [])
    base, tuned = (np.stack([np.asarray(Image.open(f), int) for f in sorted(
        (done[0] / side).glob("*.png"))]) for side in ("base", "tuned"))
    assert base.shape == (6, 32, 48, 3) and np.abs(base - tuned).mean((1, 2, 3)).min() > 2


def test_tables_hold_paired_differences_over_prompts(done, options):
    """By `score` on the two folders, and by hand."""
    from dopsd_jax import score

    folder, printed = done
    sides = {side: str(folder / side) for side in ("base", "tuned")}
    rows = list(csv.DictReader((folder / "pairs.csv").open()))
    assert [(r["prompt"], r["seed"]) for r in rows] == [
        (p, s) for p in PROMPTS for s in "56"]
    by_hand = {side: scores.measure(score.read_request(where, None, None, ["hpsv2"]), ["hpsv2"],
                                    options)["hpsv2"].values for side, where in sides.items()}
    for side, values in by_hand.items():
        np.testing.assert_allclose([float(r[f"hpsv2_{side}"]) for r in rows], values, atol=1e-5)
    difference = (by_hand["tuned"] - by_hand["base"]).reshape(3, 2)
    expected = mean_interval(difference)
    kept = json.loads((folder / "scores.json").read_text())
    assert (kept["prompts"], kept["seeds"], kept["pairs"]) == (3, [5, 6], 6)
    found = kept["metrics"]["hpsv2"]
    assert found["base"] == pytest.approx(by_hand["base"].mean(), abs=1e-6)
    assert found["difference"] == pytest.approx(vars(expected), abs=1e-6)
    assert found["tuned higher in"]["value"] == pytest.approx((difference > 0).mean())
    request = score.read_request(sides["tuned"], sides["base"], "name", ["lpips", "clip_image"])
    between = scores.measure(request, ["lpips", "clip_image"], options)
    for name, s in between.items():
        np.testing.assert_allclose([float(r[f"{name}_to_base"]) for r in rows], s.values, atol=1e-5)
        assert kept["metrics"][name]["tuned to base"]["value"] == pytest.approx(
            s.values.mean(), abs=1e-6)
    assert list(kept["metrics"]) == ["sharpness", "clip_text", "clip_image", "lpips", "hpsv2"]
    assert (folder / "table.md").read_text().strip() in printed
    assert (f"| hpsv2 | {found['base']:.4f} | {found['tuned']:.4f} | {expected.value:+.4f} ["
            in printed)
    assert "| lpips | lower | " in printed and "| clip_image | higher | " in printed


def test_only_what_is_missing_is_drawn_and_what_is_kept_is_not_measured(
    copy, plan, options, monkeypatch
):
    asked = plan(copy)
    before = {f: np.asarray(Image.open(f), int) for f in copy.rglob("0*.png")}
    (copy / "tuned" / "0002_6.png").unlink()  # in the second batch
    drawn, measured = [], []
    generate, measure = sample.generate, paired.measure
    monkeypatch.setattr(sample, "generate", lambda pipe, prompts, **how: drawn.append(
        (prompts, how["lora"] is not None)) or generate(pipe, prompts, **how))
    monkeypatch.setattr(paired, "measure", lambda request, metrics, *a, **how: measured.append(
        metrics) or measure(request, metrics, *a, **how))
    paired.claim(asked)
    paired.draw(asked, 4)
    last = PROMPTS[2]
    assert drawn == [([last] * 4, True)]  # two rows, filled up to a batch
    for file, old in before.items():
        assert np.abs(np.asarray(Image.open(file), int) - old).mean() < 0.2
    metrics = ["clip_text", "clip_image", "lpips", "hpsv2"]
    found = paired.score(asked, metrics, options, "cpu")
    assert not measured
    text = paired.write_results(asked, found)
    assert text == (copy / "table.md").read_text()
    (copy / "scores" / "lpips.json").unlink()
    again = paired.score(asked, metrics, options | {"hpsv2": options["clip"]}, "cpu")
    assert measured == [["lpips"], ["hpsv2"]]  # gone, and by other weights
    np.testing.assert_allclose(again["lpips"].tuned, found["lpips"].tuned, atol=1e-6)
    assert not np.allclose(again["hpsv2"].tuned, found["hpsv2"].tuned)


def test_prompts_and_seeds_may_be_added_and_nothing_else_changed(copy, plan, lora):
    for changed, message in [
        (dict(lora=lora), r"lora: was \['\w+ x 0.5'\], now \['\w+'\]"),
        (dict(num_steps=1, width=32), "num_steps: was 2, now 1\n  width: was 48, now 32"),
        (dict(seeds=1), "seeds: 2 were drawn, to which others may only be added; number 2 was 6, "
                        "now none"),
        (dict(prompts=["a red fox", "a blue fox", "snow"]),
         "prompts: 3 were drawn, .* number 2 was 'the sea', now 'a blue fox'"),
    ]:
        with pytest.raises(ValueError, match=f"was drawn otherwise; .*\n  {message}"):
            paired.claim(plan(copy, **changed))
    grown = plan(copy, [*PROMPTS, "a hill"], seeds=3)
    paired.claim(grown)
    history = json.loads((copy / "paired.json").read_text())
    assert history["seeds"] == [5, 6, 7] and history["prompts"][3] == "a hill"
    before = np.asarray(Image.open(copy / "base" / "0001_6.png"), int)
    paired.draw(grown, 4)
    assert len(list((copy / "tuned").glob("*.png"))) == 12
    again = np.asarray(Image.open(copy / "base" / "0001_6.png"), int)
    assert np.abs(again - before).mean() < 0.2
    with pytest.raises(ValueError, match="to which others may only be added"):
        paired.claim(plan(copy))


def test_a_directory_of_other_things_and_damaged_files_are_refused(copy, plan, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    with pytest.raises(ValueError, match="mine: holds other things; choose a new --workdir"):
        paired.claim(plan(tmp_path / "mine"))
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["x"]
    (copy / "scores" / "sharpness.json").write_text('{"of": 3}')
    with pytest.raises(ValueError, match=r"sharpness.json: damaged; delete it, and it is measured"):
        paired.score(plan(copy), [], {}, "cpu")
    (copy / "paired.json").write_text("{")
    with pytest.raises(ValueError, match=r"paired.json: damaged; restore it, or choose another"):
        paired.claim(plan(copy))


def test_what_cannot_be_drawn_is_said_together_before_weights_are_read(tiny, tmp_path):
    with pytest.raises(ValueError) as e:
        paired.planned(tmp_path, str(tiny.pipeline), None, [], str(tmp_path / "none.txt"),
                       first_seed=0, seeds=0, **SIZE)
    for part in ("what was tuned: --lora, or --tuned_model", "seeds: expected at least 1",
                 "prompts: expected a text file with a prompt in each line, found none at"):
        assert part in str(e.value)
    (tmp_path / "p.txt").write_text("a fox\n")
    with pytest.raises(ValueError) as e:
        paired.planned(tmp_path, str(tiny.pipeline), None, ["nowhere.safetensors"],
                       str(tmp_path / "p.txt"), first_seed=0, seeds=1, **SIZE | {"height": 40})
    assert "nowhere.safetensors: no such file" in str(e.value)
    assert "expected height and width in positive multiples of 16, got 40x48" in str(e.value)


def test_a_model_of_its_own_may_be_the_tuned_side(tiny, lora, pipe, tmp_path):
    """As full fine-tuning exports it: here the same model, so that nothing differs."""
    other = shutil.copytree(tiny.pipeline, tmp_path / "other")
    (tmp_path / "p.txt").write_text("a fox\n")
    asked = paired.planned(tmp_path / "w", str(tiny.pipeline), str(other), [],
                           str(tmp_path / "p.txt"), first_seed=0, seeds=1, **SIZE)
    paired.claim(asked)
    paired.draw(asked, 4)
    base, tuned = (asked.files(side)[0] for side in ("base", "tuned"))
    assert base.read_bytes() == tuned.read_bytes()
    assert json.loads(tuned.with_suffix(".json").read_text())["model"] == str(other)
    text = paired.write_results(asked, paired.score(asked, [], {}, "cpu"))
    assert "+0.0000 (no interval of 1 prompt) | 0.500 (no interval of 1 prompt)" in text


def test_the_pairs_that_moved_most_come_first():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((4, 2))
    tuned = base.copy()
    tuned[2, 1] += 3.0
    to_base = np.full((4, 2), 0.1)
    to_base[1, 0] = 0.2
    measured = {"hpsv2": Measured(base, tuned), "lpips": Measured(None, to_base)}
    order = np.argsort(-figures.moved(measured).ravel(), kind="stable")
    assert order[:2].tolist() == [5, 2]
    # A cosine to the base counts by its distance from 1.
    cosine = {"clip_image": Measured(None, np.array([[1.0, 0.2], [0.9, 1.0]]))}
    assert np.argsort(-figures.moved(cosine).ravel()).tolist()[:2] == [1, 2]
    assert not figures.moved({"hpsv2": Measured(base, base)}).any()


def test_the_contact_sheet_has_base_and_tuned_beside_each_other(tmp_path):
    rows = []
    for i, (size, colours) in enumerate([((64, 48), ("red", "blue")),
                                         ((600, 400), ("green", "black"))]):
        files = []
        for side, colour in zip(("base", "tuned"), colours, strict=True):
            files.append(tmp_path / f"{i}{side}.png")
            Image.new("RGB", size, colour).save(files[-1])
        rows.append((*files, "a long prompt 中 " * 30, ["seed 3"]))
    sheet = figures.contact_sheet(rows)
    wide = 256
    assert sheet.shape[1] == 2 * wide + 300 + 4 * 6
    for y, x, colour in [(100, 100, (255, 0, 0)), (100, wide + 50, (0, 0, 255)),
                         (300, 100, (0, 128, 0)), (300, wide + 50, (0, 0, 0))]:
        assert tuple(sheet[y, x]) == colour
    assert (sheet[20:120, 2 * wide + 20 :] < 128).any()  # words
