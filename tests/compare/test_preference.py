"""PickScore, HPS v2 and ImageReward against their makers' own code.

What hpsv2 and image-reward say of the same tiny weights stands in preference_oracles.json; see
preference_oracles.py. PickScore is compared with the lines of its model card.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file

from dopsd_jax.compare import hpsv2, scores
from dopsd_jax.compare.hpsv2 import Hps
from dopsd_jax.compare.image_reward import ImageReward
from dopsd_jax.compare.metric_weights import METRICS
from tests.compare.preference_weights import PROMPTS, pictures

ORACLES = json.loads(Path(__file__).with_name("preference_oracles.json").read_text())
# Of PICTURES per prompt the tall one is shrunk; there Pillow 13, with which the makers' packages
# were asked, is up to 8 levels of 255 from Pillow 12.
PICTURES, TALL = 3, 1
KEPT = [i for i in range(PICTURES * len(PROMPTS))
        if i % PICTURES != TALL or int(PIL.__version__.split(".")[0]) >= 13]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Every tiny picture with every prompt."""
    folder = tmp_path_factory.mktemp("asked")
    files = []
    for i, picture in enumerate(pictures()):
        files.append(folder / f"{i}.png")
        picture.save(files[-1])
    prompts = [p for p in PROMPTS for _ in files]
    return scores.Request(files * len(PROMPTS), prompts, (), (), None)


def values(metric, directory, asked):
    return scores.measure(asked, [metric], {METRICS[metric].weights: directory})[metric].values


@pytest.mark.parametrize("metric", ORACLES)
def test_scores_are_those_of_the_makers_packages(metric, metric_weights, asked):
    found = values(metric, metric_weights / metric, asked)
    compared = KEPT if metric == "imagereward" else range(len(found))
    for i in compared:
        np.testing.assert_allclose(found[i], np.ravel(ORACLES[metric])[i], atol=2e-5, rtol=2e-5)


def test_pickscore_is_the_scale_times_the_cosine(metric_weights, asked):
    model = transformers.CLIPModel.from_pretrained(metric_weights / "clip")
    processor = transformers.AutoImageProcessor.from_pretrained(
        metric_weights / "clip", backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(metric_weights / "clip")
    texts = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        seen = model.get_image_features(
            **processor(images=[Image.open(f) for f in asked.pictures[:3]], return_tensors="pt")
        ).pooler_output
        read = model.get_text_features(**texts).pooler_output
        seen, read = (x / x.norm(dim=-1, keepdim=True) for x in (seen, read))
        expected = (model.logit_scale.exp() * read @ seen.T).flatten().numpy()
    found = values("pickscore", metric_weights / "clip", asked)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    assert np.ptp(found) > 0.05


@pytest.mark.parametrize("prefix", ["model.", "module."])
def test_hps_may_stand_under_a_prefix(prefix, metric_weights, asked, tmp_path):
    folder = shutil.copytree(metric_weights / "hpsv2", tmp_path / "hpsv2")
    tensors = load_file(folder / "model.safetensors")
    save_file({prefix + k: x for k, x in tensors.items()}, folder / "model.safetensors")
    np.testing.assert_allclose(
        values("hpsv2", folder, asked), np.ravel(ORACLES["hpsv2"]), atol=2e-5
    )


def test_hps_may_have_the_names_of_transformers(metric_weights, asked, tmp_path):
    folder = shutil.copytree(metric_weights / "hpsv2", tmp_path / "hpsv2")
    Hps(folder).model.save_pretrained(folder)
    assert hpsv2.MARK not in load_file(folder / "model.safetensors")
    np.testing.assert_allclose(
        values("hpsv2", folder, asked), np.ravel(ORACLES["hpsv2"]), atol=2e-5
    )


def test_equal_rows_are_scored_once_and_all_rows_are_given(metric_weights, asked, monkeypatch):
    """Pictures beyond one batch, the same ones again and again."""
    seen = []
    net = ImageReward(metric_weights / "imagereward")
    vision = net.vision.forward
    monkeypatch.setattr(net.vision, "forward", lambda x: seen.append(len(x)) or vision(x))
    found = net.scores(list(asked.pictures) * 3, list(asked.prompts) * 3)
    found = np.reshape(found, (3, -1))
    np.testing.assert_array_equal(found[1:], found[:-1])
    np.testing.assert_allclose(found[0, KEPT], np.ravel(ORACLES["imagereward"])[KEPT], atol=1e-4)
    assert seen == [6]


def test_prompts_that_are_cut_are_counted(metric_weights):
    for net, longest in ((Hps(metric_weights / "hpsv2"), 77),
                         (ImageReward(metric_weights / "imagereward"), 35)):
        assert net.longest == longest
        assert net.too_long([PROMPTS[0], "x " * (longest - 2), "x " * (longest - 1)]) == 1


@pytest.fixture
def changed(metric_weights, tmp_path):
    """changed(metric, name, tensor): a copy with one tensor replaced, or, by None, gone."""
    def change(metric, name, tensor):
        folder = shutil.copytree(metric_weights / metric, tmp_path / metric)
        tensors = load_file(folder / "model.safetensors") | {name: tensor}
        save_file({k: x for k, x in tensors.items() if x is not None}, folder / "model.safetensors")
        return folder

    return change


@pytest.mark.parametrize("metric,name,shape,message", [
    ("hpsv2", "visual.proj", None, r"visual_projection.weight: expected \(16, 32\), got none"),
    ("hpsv2", "visual.extra.weight", (2,), r"tensors of open_clip's CLIP, got \['visual.extra.we"),
    ("hpsv2", "ln_final.weight", (25,),
     r"text_model.final_layer_norm.weight: expected \(24,\), got \(25,\)"),
    ("imagereward", "mlp.layers.4.bias", None, r"Head, 1 tensors differ: layers.4.bias: expected"),
    ("imagereward", "blip.text_encoder.embeddings.word_embeddings.weight", None,
     "whose sizes are read from its tensors; KeyError"),
    ("imagereward", "blip.itm_head.weight", (2, 128),
     r"names begin with blip.visual_encoder., .* others: \['blip.itm_head.weight'\] \(1\)"),
    ("imagereward", "blip.visual_encoder.blocks.1.norm2.bias", (3,),
     r"BlipVisionModel, 1 tensors differ: encoder.layers.1.layer_norm2.bias: expected \(128,\)"),
])
def test_other_tensors_are_refused(metric, name, shape, message, changed):
    tensor = None if shape is None else np.zeros(shape, np.float32)
    folder = changed(metric, name, tensor)
    with pytest.raises(ValueError, match=message):
        (Hps if metric == "hpsv2" else ImageReward)(folder)
