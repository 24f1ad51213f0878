"""CLIP and DINO against transformers' own processors and models, called directly."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from skimage import data as photographs

from dopsd_jax.compare.features import Clip, Dino

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROMPTS = ["the cat", "A photo of the rocket, at night", "x"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Real photographs of three sizes."""
    folder = tmp_path_factory.mktemp("files")
    found = []
    for name, size in (("astronaut", (64, 64)), ("chelsea", (96, 64)), ("coffee", (50, 70))):
        found.append(folder / f"{name}.png")
        Image.fromarray(getattr(photographs, name)()).resize(size).save(found[-1])
    return found


def opened(files):
    return [Image.open(f).convert("RGB") for f in files]


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1).detach().numpy()


def test_clip_is_transformers_processor_and_model(metric_weights, files):
    clip = Clip(metric_weights / "clip")
    directory = metric_weights / "clip"
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3,
        ),
        transformers.CLIPTokenizer.from_pretrained(directory),
    )
    model = transformers.CLIPModel.from_pretrained(directory)
    inputs = processor(text=PROMPTS, images=opened(files), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    np.testing.assert_allclose(clip.images(files), expected.image_embeds, atol=2e-5, rtol=0)
    np.testing.assert_allclose(clip.texts(PROMPTS), expected.text_embeds, atol=2e-5, rtol=0)
    cosines = clip.images(files) @ clip.texts(PROMPTS).T
    assert np.ptp(cosines) > 0.05  # pictures and prompts do differ in it


def test_long_prompts_are_cut_where_clip_ends_and_counted(metric_weights):
    clip = Clip(metric_weights / "clip")
    long = "a" * 75 + " b"  # one token too many; CLIP keeps the mark of the end
    assert clip.too_long(["the", "a" * 75, long]) == 1
    cut = clip.texts([long])
    assert np.isfinite(cut).all() and not np.allclose(cut, clip.texts(["a" * 74]), atol=1e-3)


def test_more_pictures_than_a_batch(metric_weights, files):
    clip = Clip(metric_weights / "clip")
    many = clip.images(files * 4)
    np.testing.assert_allclose(many, np.tile(clip.images(files), (4, 1)), atol=2e-6)


PROCESSORS = {
    "vit": lambda: transformers.ViTImageProcessorPil(
        size={"height": 32, "width": 32}, resample=3, **IMAGENET),
    "dinov2": lambda: transformers.BitImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42}, resample=3,
        do_center_crop=True, **IMAGENET),
}
PROCESSORS["dinov2_with_registers"] = PROCESSORS["dinov2"]
MODELS = {"vit": transformers.ViTModel, "dinov2": transformers.Dinov2Model,
          "dinov2_with_registers": transformers.Dinov2WithRegistersModel,
          "dinov3_vit": transformers.DINOv3ViTModel}
FIRST_PATCH = {"vit": 1, "dinov2": 1, "dinov2_with_registers": 4, "dinov3_vit": 5}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_dino_is_the_mean_patch_of_transformers_model(metric_weights, files, kind):
    model = MODELS[kind].from_pretrained(metric_weights / kind)
    pixels = PROCESSORS[kind]()(images=opened(files), return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
    found = Dino(metric_weights / kind).images(files)
    np.testing.assert_allclose(found, unit(tokens[:, FIRST_PATCH[kind]:].mean(1)), atol=2e-5,
                               rtol=0)
    assert not np.allclose(found, unit(tokens[:, 0]), atol=0.05)
    assert np.abs(found[0] - found[1]).max() > 0.01


@pytest.mark.parametrize("kind", MODELS)
def test_dino_at_the_drawn_size_sees_every_pixel(metric_weights, files, kind):
    """The published way: stretched to one size, scaled by the colours alone."""
    model = MODELS[kind].from_pretrained(metric_weights / kind)
    images = [np.asarray(i.resize((96, 64), Image.Resampling.BICUBIC)) for i in opened(files)]
    pixels = torch.tensor(np.stack(images) / 255.0).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(IMAGENET[k])[:, None, None] for k in ("image_mean", "image_std"))
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        tokens = model(((pixels - mean) / std).float(), **options).last_hidden_state
    assert tokens.shape[1] > 90
    found = Dino(metric_weights / kind, own_size=True).images(files, (96, 64))
    np.testing.assert_allclose(found, unit(tokens[:, FIRST_PATCH[kind]:].mean(1)), atol=2e-5,
                               rtol=0)


@pytest.fixture
def broken(metric_weights, tmp_path):
    """copy(name, change): a copy of weights after change(its folder)."""
    def copy(name, change):
        shutil.copytree(metric_weights / name, tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    return copy


def edit(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_another_network_is_refused(metric_weights, broken):
    with pytest.raises(ValueError, match="expected model_type clip, got 'vit'"):
        Clip(metric_weights / "vit")
    with pytest.raises(ValueError, match="expected model_type vit or dinov2 or .*, got 'clip'"):
        Dino(metric_weights / "clip")
    deeper = broken("vit", lambda f: edit(f, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"the weights of ViTModel; missing 16 \['layers.2"):
        Dino(deeper)
    edit(deeper, num_hidden_layers=1)
    with pytest.raises(ValueError, match="missing 0 .*, not of it 16 .*another task"):
        Dino(deeper)


def test_code_in_the_folder_is_not_run_and_pickles_are_not_read(broken, tmp_path):
    def plant(folder):
        (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        file = folder / "preprocessor_config.json"
        values = json.loads(file.read_text()) | {
            "auto_map": {"AutoImageProcessor": "mine.Processor"}, "image_processor_type": "Mine"}
        file.write_text(json.dumps(values))

    with pytest.raises(ValueError, match="cannot open it as AutoImageProcessor"):
        Dino(broken("vit", plant))

    def pickled(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(ValueError, match="cannot open it as AutoModel"):
        Dino(broken("dinov2", pickled))
    assert not (tmp_path / "ran").exists()


def test_a_processor_that_needs_torchvision_says_what_to_do(metric_weights):
    if transformers.utils.is_torchvision_available():
        pytest.skip("torchvision is here")
    with pytest.raises(ValueError, match=r"needs torchvision.*--dino_size=drawn"):
        Dino(metric_weights / "dinov3_vit")


def test_damaged_files_are_named(broken):
    def cut(folder):
        (folder / "preprocessor_config.json").write_text('{"image_mean": [1,')

    folder = broken("dinov3_vit", cut)
    with pytest.raises(ValueError, match="preprocessor_config.json: expected image_mean and"):
        Dino(folder, own_size=True)
    with pytest.raises(ValueError, match="config.json: expected JSON with a model_type"):
        Dino(broken("vit", lambda f: (f / "config.json").write_text("[]")))
