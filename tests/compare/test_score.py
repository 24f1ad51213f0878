"""The scoring command on pictures that `sample` drew, on tiny weights of the real layouts."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dopsd_jax import score
from dopsd_jax.compare import metric_weights as weights
from dopsd_jax.compare import scores
from dopsd_jax.compare.features import Clip, Dino
from dopsd_jax.compare.lpips import Lpips
from tests import commands

ROOT = Path(__file__).parents[2]
PROMPTS = ["a [V] in the snow", "a red fox", "the sea, " * 20]


def run(module, *args):
    return commands.run(f"dopsd_jax.{module}", *args, COLUMNS="200")


@pytest.fixture(scope="module")
def drawn(tiny, tmp_path_factory):
    """What the sampling command writes for three prompts, 64x48 (width x height)."""
    folder = tmp_path_factory.mktemp("drawn")
    done = run("sample", "--model", tiny.pipeline, *(f"--prompt={p}" for p in PROMPTS),
               "--num_steps=1", "--height=48", "--width=64", "--dtype=float32", "--seed=7",
               "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def partners(drawn, tmp_path_factory):
    """Another picture of the same name for each, JPEG, of another size."""
    folder = tmp_path_factory.mktemp("partners")
    for i, file in enumerate(sorted(drawn.glob("*.png"))):
        image = Image.open(file).resize((40 + 16 * i, 56)).rotate(90)
        image.save(folder / f"{file.stem}.jpg", quality=95)
    return folder


@pytest.fixture
def options(metric_weights):
    return {"clip": str(metric_weights / "clip"), "dino": str(metric_weights / "vit"),
            "lpips": str(metric_weights / "lpips"), "pickscore": str(metric_weights / "clip"),
            "hpsv2": str(metric_weights / "hpsv2"),
            "imagereward": str(metric_weights / "imagereward")}


# Those of pictures against references, and of CLIP.
ALL = ["clip_text", "clip_image", "dino", "lpips"]


def test_the_command_prints_a_table_and_writes_a_line_per_picture(
    drawn, partners, options, tmp_path
):
    out = tmp_path / "new" / "scores.csv"
    done = run("score", "--pictures", drawn, "--references", partners, "--pairing=name",
               "--replace=[V]=dog", "--out", out, *(f"--{k}={v}" for k, v in options.items()))
    assert done.returncode == 0, done.stderr
    assert "1 of 3 prompts are longer than the 77 tokens that it reads" in done.stderr
    assert os.listdir(out.parent) == ["scores.csv"]
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == ["picture", "prompt", "clip_text", "clip_image",
                             "clip_image_reference", "dino", "dino_reference", "lpips",
                             "lpips_reference", "pickscore", "hpsv2", "imagereward"]
    files = sorted(drawn.glob("*.png"))
    assert [r["picture"] for r in rows] == [f.name for f in files]
    assert rows[0]["prompt"] == "a dog in the snow" and files[0].name.startswith("0007-a-V-in-the")
    assert [Path(r["lpips_reference"]).stem for r in rows] == [f.stem for f in files]
    model = transformers.CLIPModel.from_pretrained(options["clip"])
    tokenizer = transformers.CLIPTokenizer.from_pretrained(options["clip"])
    processor = transformers.AutoImageProcessor.from_pretrained(options["clip"], backend="pil")
    for row in rows:
        with torch.no_grad():
            found = model(
                **processor(Image.open(drawn / row["picture"]), return_tensors="pt"),
                **tokenizer(row["prompt"], truncation=True, max_length=77, return_tensors="pt"),
            )
        expected = (found.image_embeds @ found.text_embeds.T).item()
        assert float(row["clip_text"]) == pytest.approx(expected, abs=2e-5)
    for name in weights.METRICS:
        values = [float(r[name]) for r in rows]
        assert f"| {name} | {'lower' if name in ('dino', 'lpips') else 'higher'} | " \
               f"{np.mean(values):.4f} | [" in done.stdout
    assert f"wrote {out}" in done.stdout


def request(pictures, references, pairing):
    return score.read_request(str(pictures), str(references), pairing, ["lpips"])


def by_hand(options, pictures, references):
    """metric -> [pictures, references] of every pair, by the networks."""
    ours, others = sorted(pictures.glob("*.png")), sorted(references.glob("*.jpg"))
    clip, dino, lpips = Clip(options["clip"]), Dino(options["dino"]), Lpips(options["lpips"])
    distances = np.zeros((len(ours), len(others)))
    for i, a in enumerate(ours):
        image = Image.open(a)
        distances[i] = lpips.distances(image, [
            Image.open(b).resize(image.size, Image.Resampling.BICUBIC) for b in others
        ])
    return {"clip_image": clip.images(ours) @ clip.images(others).T,
            "dino": 1 - dino.images(ours) @ dino.images(others).T, "lpips": distances}


def test_pairings_take_the_partner_the_nearest_or_the_mean(drawn, partners, options):
    every = by_hand(options, drawn, partners)
    names = sorted(f.name for f in partners.iterdir())
    metrics = list(every)
    for pairing in ("name", "nearest", "all"):
        found = scores.measure(request(drawn, partners, pairing), metrics, options)
        assert list(found) == metrics
        for name, table in every.items():
            best = (np.argmax if name == "clip_image" else np.argmin)(table, 1)
            expected, mates = {
                "name": (np.diag(table), names),
                "nearest": (table[np.arange(3), best], [names[b] for b in best]),
                "all": (table.mean(1), [""] * 3),
            }[pairing]
            np.testing.assert_allclose(found[name].values, expected, atol=1e-5)
            assert list(found[name].partners) == mates


def test_a_picture_against_itself_is_alike_in_everything(drawn, options):
    for size in scores.DINO_SIZES:
        found = scores.measure(request(drawn, drawn, "nearest"), ALL[1:], options, dino_size=size)
        np.testing.assert_allclose(found["clip_image"].values, 1, atol=1e-5)
        np.testing.assert_allclose(found["dino"].values, 0, atol=1e-5)
        np.testing.assert_allclose(found["lpips"].values, 0, atol=1e-7)
        assert found["lpips"].partners == sorted(p.name for p in drawn.glob("*.png"))


def test_dino_as_published_works_at_each_drawn_size(drawn, partners, options, metric_weights):
    """Pictures of three sizes and DINOv3, whose own processor is not needed."""
    asked, dino = request(partners, drawn, "name"), str(metric_weights / "dinov3_vit")
    found = scores.measure(asked, ["dino"], {"dino": dino}, dino_size="drawn")["dino"].values
    net = Dino(dino, own_size=True)
    sizes = [Image.open(a).size for a in asked.pictures]
    for i, (a, b) in enumerate(zip(asked.pictures, asked.references, strict=True)):
        cosine = net.images([a], sizes[i])[0] @ net.images([b], sizes[i])[0]
        assert found[i] == pytest.approx(1 - cosine, abs=1e-5)
    assert len(set(sizes)) == 3


def test_pictures_of_one_prompt_are_one_case():
    values = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5])
    case = score.cases(["a", "a", "a", "b", "b", "b", "c"])
    row = score.summary(values, case)
    assert row["mean"] == "0.5000" and row["pictures"] == "7" and row["cases"] == "3"
    low, high = (float(x) for x in row["95% interval"].strip("[]").split(","))
    alone = score.summary(values, np.arange(7))["95% interval"].strip("[]").split(",")
    assert high - low > 1.1 * (float(alone[1]) - float(alone[0]))
    for prompts in (["a"] * 3, [None, "a", "b"]):
        assert score.cases(prompts).tolist() == [0, 1, 2]
    assert score.summary(np.ones(1), np.zeros(1, int))["95% interval"] == "none of 1 case"


def test_the_metrics_are_those_whose_weights_are_given(metric_weights):
    def chosen(*given, metrics=None, references=True):
        known = dict.fromkeys(weights.DOWNLOADS) | dict.fromkeys(given, "somewhere")
        return weights.chosen_metrics(metrics, known, references=references)

    assert chosen("clip", "hpsv2") == ["clip_text", "clip_image", "hpsv2"]
    assert chosen("clip", "hpsv2", references=False) == ["clip_text", "hpsv2"]
    assert chosen("clip", metrics=["clip_image"]) == ["clip_image"]
    assert chosen() == list(weights.METRICS)  # and then all that is missing is listed
    assert chosen(references=False) == ["clip_text", "pickscore", "hpsv2", "imagereward"]
    with pytest.raises(ValueError, match=r"--dino, --lpips: compares with references; name --ref"):
        chosen("clip", "dino", "lpips", references=False)
    with pytest.raises(ValueError, match="expected some of clip_text, .* got .'fid'."):
        chosen("clip", metrics=["clip_text", "fid"])
    with pytest.raises(ValueError, match="metrics: expected some of"):
        chosen("clip", metrics=[])


def test_missing_weights_list_what_to_download_for_the_metrics_asked_for(tmp_path, metric_weights):
    none = dict.fromkeys(weights.DOWNLOADS)
    with pytest.raises(ValueError) as e:
        weights.check_weights(ALL, none)
    for part in ("clip_text, clip_image: --clip is not given", "dino: --dino is not given",
                 "lpips: --lpips is not given", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
                 "facebook/dino-vits16", "facebook/dinov2-base", "timm/vgg16.tv_in1k",
                 weights.CONVERT_DINO, weights.CONVERT_HEADS):
        assert part in str(e.value)
    with pytest.raises(ValueError) as e:
        weights.check_weights(["lpips"], none)
    assert "--clip" not in str(e.value) and "--dino" not in str(e.value)
    weights.check_weights(["clip_text"], none | {"clip": metric_weights / "clip"})

    shutil.copytree(metric_weights / "clip", tmp_path / "clip")
    for name in ("model.safetensors", "merges.txt"):
        (tmp_path / "clip" / name).unlink()
    (tmp_path / "clip" / "pytorch_model.bin").write_bytes(b"a pickle")
    shutil.copytree(metric_weights / "lpips", tmp_path / "lpips")
    (tmp_path / "lpips" / "lpips_vgg.safetensors").unlink()
    with pytest.raises(ValueError, match=r"clip lacks model.safetensors, merges.txt\n  --clip: a"):
        weights.check_weights(["clip_text"], none | {"clip": tmp_path / "clip"})
    with pytest.raises(ValueError, match="lpips lacks lpips_vgg.safetensors\n"):
        weights.check_weights(["lpips"], none | {"lpips": tmp_path / "lpips"})
    (tmp_path / "lpips" / "lpips_vgg.safetensors").write_bytes(b"version https://git-lfs.github")
    with pytest.raises(ValueError, match="lpips_vgg.safetensors: this is a git-lfs pointer"):
        weights.check_weights(["lpips"], none | {"lpips": tmp_path / "lpips"})


def test_the_command_for_pickled_dino_makes_what_is_read(tmp_path, metric_weights):
    """The line users are given, on a tiny pickle of the layout of facebook/dino-vits16."""
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copy(metric_weights / "vit" / file, tmp_path)
    model = transformers.ViTModel.from_pretrained(metric_weights / "vit")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="lacks model.safetensors"):
        weights.check_weights(["dino"], {"dino": tmp_path})
    python, rest = weights.CONVERT_DINO.split(" ", 1)
    assert python == "python"
    subprocess.run(f"{sys.executable} {rest}", shell=True, cwd=tmp_path, check=True)
    weights.check_weights(["dino"], {"dino": tmp_path})
    file = tmp_path / "a.png"
    Image.effect_noise((64, 64), 90).convert("RGB").save(file)
    np.testing.assert_allclose(Dino(tmp_path).images([file]),
                               Dino(metric_weights / "vit").images([file]), atol=1e-6)


def test_the_command_for_pickled_heads_makes_what_is_read(tmp_path, metric_weights):
    heads = weights.HEADS
    shutil.copy(metric_weights / "lpips" / weights.VGG, tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(metric_weights / "lpips" / heads)
    torch.save(tensors, tmp_path / "vgg.pth")
    rest = weights.CONVERT_HEADS.split(" ", 1)[1]
    subprocess.run(f"{sys.executable} {rest}", shell=True, cwd=tmp_path, check=True)
    made = load_file(tmp_path / heads)
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[k], tensors[k]) for k in made)
    Lpips(tmp_path)


@pytest.mark.parametrize("metric,command,pickle,nested", [
    ("hpsv2", weights.CONVERT_HPS, "HPS_v2.1_compressed.pt", True),
    ("imagereward", weights.CONVERT_REWARD, "ImageReward.pt", False),
])
def test_the_commands_for_models_of_preference_make_what_is_read(
    metric, command, pickle, nested, tmp_path, metric_weights
):
    from safetensors.torch import load_file

    folder = shutil.copytree(metric_weights / metric, tmp_path / metric)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": tensors} if nested else tensors, folder / pickle)
    with pytest.raises(ValueError) as e:
        weights.check_weights([metric], {metric: folder})
    assert f"{metric} lacks model.safetensors" in str(e.value) and command in str(e.value)
    with pytest.raises(ValueError, match=r"\.pt: expected a directory, found a file, a pickle, wh"):
        weights.check_weights([metric], {metric: folder / pickle})
    rest = command.split(" ", 1)[1]
    subprocess.run(f"{sys.executable} {rest}", shell=True, cwd=folder, check=True)
    made = load_file(folder / "model.safetensors")
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[k], tensors[k]) for k in made)
    assert weights.check_weights([metric], {metric: folder}) == {metric: folder}


def test_weights_may_be_named_as_on_the_hub(metric_weights, monkeypatch, tmp_path):
    """The name goes to where models of the hub come from, and only what is no path does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "clip").symlink_to(metric_weights / "clip")
    asked = []

    def fetch(name, *, pipeline, weights):
        asked.append((name, pipeline, weights))
        return metric_weights / "clip"

    monkeypatch.setattr(weights.hub, "fetch", fetch)
    places = weights.check_weights(["clip_text", "pickscore"], {
        "clip": "org/clip", "pickscore": "yuvalkirstain/PickScore_v1"})
    assert places == {"clip": Path("org/clip"), "pickscore": metric_weights / "clip"}
    assert asked == [("yuvalkirstain/PickScore_v1", False, True)]


@pytest.mark.parametrize(
    "arguments,message",
    [({"references": None}, "clip_image, dino, lpips: compare with references; name --references"),
     ({"pairing": None}, "pairing: expected one of name, nearest, all, got None"),
     ({"pictures": "nowhere"}, "pictures: nowhere: expected a folder of pictures"),
     ({"replacements": ["[W]=dog"]}, "no prompt has"),
     ({"pictures": "partners"}, "clip_text: 3 of 3 pictures have no prompt beside them .*0007-a-")],
)
def test_requests_that_cannot_be_met(drawn, partners, arguments, message):
    given = {"pictures": str(drawn), "references": str(partners), "pairing": "name",
             "metrics": ALL} | arguments
    if given["pictures"] == "partners":
        given |= {"pictures": str(partners), "references": str(drawn)}
    with pytest.raises(ValueError, match=message):
        score.read_request(**given)


def test_an_error_leaves_the_last_csv_alone(drawn, tmp_path):
    out = tmp_path / "scores.csv"
    out.write_text("mine")
    done = run("score", "--pictures", drawn, "--metrics=clip_text", "--out", out)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "clip_text: --clip is not given" in done.stderr and "--lpips" not in done.stderr
    assert out.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_figures_that_are_no_numbers_are_refused(drawn, options, tmp_path):
    shutil.copytree(options["clip"], tmp_path / "clip")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    with torch.no_grad():
        model.visual_projection.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "clip")
    asked = score.read_request(str(drawn), None, None, ["clip_text"])
    with pytest.raises(ValueError, match=r"clip_text: NaN or infinity for 3 pictures, \['0007-a"):
        scores.measure(asked, ["clip_text"], {"clip": str(tmp_path / "clip")})


def test_without_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs torch.*pip install -e '\.\[score\]'"):
        scores.check_torch("cpu")
