"""LPIPS against a plain torch rendering of its formula, and what it must do whatever the weights.

Against the package lpips 0.1.4 itself, with its own heads and a random VGG16 of full width, it was
run once: the package needs torchvision, which the tests do without.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data as photographs
from torch import nn

from dopsd_jax.compare.lpips import Lpips

# VGG16 by its own description: widths, and M for a pooling.
ROWS = ["aa", "bb", "ccc", "ddd", "eee"]


def photo(name, size=(80, 48)):
    return Image.fromarray(getattr(photographs, name)()).convert("RGB").resize(size)


@pytest.fixture
def expected(metric_weights):
    """(image, other) -> LPIPS by equation 1 of the paper, in float64."""
    tensors = load_file(metric_weights / "lpips" / "model.safetensors")
    heads = load_file(metric_weights / "lpips" / "lpips_vgg.safetensors")
    layers, ends, width = [], [], 3
    for row in ROWS:
        for _ in row:
            weight, bias = (tensors[f"features.{len(layers)}.{p}"] for p in ("weight", "bias"))
            conv = nn.Conv2d(width, len(weight), 3, padding=1)
            conv.load_state_dict({"weight": weight, "bias": bias})
            layers += [conv, nn.ReLU()]
            width = len(weight)
        ends.append(len(layers))
        layers.append(nn.MaxPool2d(2, 2))
    network = nn.Sequential(*layers[:-1]).double()

    def features(image):
        x = torch.tensor(np.asarray(image) / 255.0).permute(2, 0, 1)[None] * 2 - 1
        for channel, (shift, scale) in enumerate(
            [(-0.030, 0.458), (-0.088, 0.448), (-0.188, 0.450)]
        ):
            x[:, channel] = (x[:, channel] - shift) / scale
        return [network[:end](x)[0] for end in ends]

    @torch.no_grad()
    def distance(image, other):
        total = 0.0
        for i, (a, b) in enumerate(zip(features(image), features(other), strict=True)):
            a, b = (y / (torch.linalg.vector_norm(y, dim=0) + 1e-10) for y in (a, b))
            weights = heads[f"lin{i}.model.1.weight"].double().flatten()
            total += torch.einsum("c,chw->hw", weights, (a - b) ** 2).mean().item()
        return total

    return distance


def test_lpips_is_its_formula(metric_weights, expected):
    net = Lpips(metric_weights / "lpips")
    a, b, c = (photo(name) for name in ("astronaut", "chelsea", "coffee"))
    found = net.distances(a, [b, c])
    assert found == pytest.approx([expected(a, b), expected(a, c)], abs=2e-5)
    assert min(found) > 0.05 and abs(found[0] - found[1]) > 1e-3


def test_equal_pictures_are_at_zero_and_small_changes_near(metric_weights):
    net = Lpips(metric_weights / "lpips")
    a, b = photo("astronaut"), photo("chelsea")
    near = Image.blend(a, b, 0.05)
    zero, small, large = net.distances(a, [a, near, b])
    assert zero == 0.0 and 0 < small < 0.2 * large
    assert net.distances(b, [a]) == pytest.approx([large])


def test_pictures_of_other_sizes_are_refused(metric_weights):
    net = Lpips(metric_weights / "lpips")
    with pytest.raises(ValueError, match=r"one size .* got \(80, 48\) and \(48, 80\)"):
        net.distances(photo("coffee"), [photo("coffee", (48, 80))])
    tiny = photo("coffee", (80, 15))
    with pytest.raises(ValueError, match=r"sides of at least 16 pixels, got \(80, 15\)"):
        net.distances(tiny, [tiny])


@pytest.fixture
def changed(metric_weights, tmp_path):
    """changed(file, name, tensor): the folder with one tensor replaced, or, by None, gone."""
    for file in (metric_weights / "lpips").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def change(file, name, tensor):
        tensors = load_file(tmp_path / file) | {name: tensor}
        save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / file)
        return tmp_path

    return change


@pytest.mark.parametrize(
    "file,name,shape,message",
    [("model.safetensors", "features.17.weight", None, r"lacks features.17.weight \(1 tensors\)"),
     ("model.safetensors", "features.30.weight", (2,), "not of VGG16, has features.30.weight"),
     ("model.safetensors", "features.5.weight", (6, 5, 3, 3),
      r"features.5: expected weight \[C, 4, 3, 3\] and bias \[C\], got \[6, 5, 3, 3\] and \[6\]"),
     ("lpips_vgg.safetensors", "lin3.model.1.weight", None, "lacks lin3.model.1.weight"),
     ("lpips_vgg.safetensors", "lin2.model.1.weight", (1, 7, 1, 1),
      r"lin2.model.1.weight: expected \[1, 8, 1, 1\], got \[1, 7, 1, 1\]")],
)
def test_what_is_no_vgg16_or_no_heads_is_refused(changed, file, name, shape, message):
    folder = changed(file, name, None if shape is None else torch.zeros(shape))
    with pytest.raises(ValueError, match=message):
        Lpips(folder)
