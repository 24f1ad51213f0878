"""The VAE by strips of rows: the picture of the whole one, and that of diffusers."""

from __future__ import annotations

import re
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dopsd_jax.core import trees
from dopsd_jax.data.images import to_uint8
from dopsd_jax.method import contexts, sampling
from dopsd_jax.models import vae_strips
from dopsd_jax.models.flux2_vae import Flux2Vae, Flux2VaeConfig
from dopsd_jax.models.vae import Vae, VaeConfig
from dopsd_jax.weights.load import load_tree, weight_files
from dopsd_jax.weights.shapes import vae_shapes
from dopsd_jax.weights.vae_names import flux2_vae_table, vae_table

SIZES = dict(
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, latent_channels=4,
    sample_size=64,
)
PLAIN = dict(SIZES, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
             use_post_quant_conv=False)
# What is kept, of the bytes of the finest level. A block that is kept may overwrite its input.
KEPT = {"nothing": 0, "blocks, not what is inside them": 1.3, "all": 100}
FINEST = {"encode": 52 * 12 * 8 * 4, "decode": 14 * 10 * 8 * 4}


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """(diffusers' network, ours, parameters), all random, of either family."""
    torch.manual_seed(0)
    if request.param == "Z-Image":
        oracle, table = diffusers.AutoencoderKL(**PLAIN), vae_table
        ours = Vae(VaeConfig.from_json(PLAIN))
    else:
        oracle, table = diffusers.AutoencoderKLFlux2(**SIZES), flux2_vae_table
        ours = Flux2Vae(Flux2VaeConfig.from_json(SIZES))
    for name, parameter in oracle.eval().requires_grad_(False).named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif re.search(r"to_[qk]", name):
            parameter.mul_(4)
    directory = tmp_path_factory.mktemp("vae")
    oracle.save_pretrained(directory, safe_serialization=True)
    params = load_tree(weight_files(directory), table(ours.config), vae_shapes(ours))
    return oracle, ours, params


@pytest.fixture(scope="module")
def arrays():
    """Of sides that no strip of the test divides: two pictures, and raw latents of two."""
    random = np.random.default_rng(1)
    return {
        "encode": random.uniform(-1, 1, (2, 52, 12, 3)).astype(np.float32) + 0.5,
        "decode": 3 * random.standard_normal((2, 7, 5, 4)).astype(np.float32) + 2,
    }


@pytest.fixture(scope="module")
def whole(case, arrays):
    oracle, ours, params = case

    def to_torch(x):
        return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()

    theirs = {
        "encode": oracle.encode(to_torch(arrays["encode"])).latent_dist.parameters,
        "decode": oracle.decode(to_torch(arrays["decode"])).sample,
    }
    return {
        method: (x.permute(0, 2, 3, 1).numpy(), run(ours, params, method, arrays[method]))
        for method, x in theirs.items()
    }


def run(vae, params, method, x):
    apply = jax.jit(lambda params, x: vae.apply({"params": params}, x, method=method))
    return np.asarray(apply(params, x).astype(jnp.float32))


def random_parameters(vae):
    random = np.random.default_rng(0)

    def draw(x):
        return (random.standard_normal(x.shape) / np.sqrt(x.size / x.shape[-1])).astype(x.dtype)

    return jax.tree.map(draw, vae_shapes(vae))


def by_strips(monkeypatch, kept):
    """Lets every picture go by strips, and returns the list of programs that do."""
    traced = []
    for name in ("encode", "decode"):
        def told(self, params, x, name=name, plain=getattr(vae_strips.Strips, name)):
            traced.append(name)
            return plain(self, params, x)

        monkeypatch.setattr(vae_strips.Strips, name, told)
    for name, value in {"WHOLE": 0, "KEPT": kept, "STRIP": 4000}.items():
        monkeypatch.setattr(vae_strips, name, value)
    return traced


def relative_error(got, want):
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("case,kept", [
    *(("Z-Image", kept) for kept in KEPT), ("FLUX.2", "blocks, not what is inside them"),
], indirect=["case"])
def test_strips_give_what_the_whole_picture_gives(
    case, arrays, whole, method, kept, monkeypatch
):
    _, ours, params = case
    traced = by_strips(monkeypatch, KEPT[kept] * FINEST[method])
    got = run(ours, params, method, arrays[method])
    assert traced == [method]
    theirs, ours_whole = whole[method]
    assert relative_error(got, ours_whole) < 4e-6
    assert relative_error(got, theirs) < 2e-5


def test_bfloat16_rounds_as_the_whole_picture_does(arrays, monkeypatch):
    config = VaeConfig((8, 16), 1, 4, 4, 1.0, 0.0)
    params = random_parameters(Vae(config))
    exact = run(Vae(config), params, "decode", arrays["decode"])
    half = Vae(config, jnp.bfloat16), trees.cast_floats(params, jnp.bfloat16)
    plain = run(*half, "decode", arrays["decode"])
    by_strips(monkeypatch, FINEST["decode"])  # twice what the level has
    strips = run(*half, "decode", arrays["decode"])
    assert np.sqrt(np.mean((strips - exact) ** 2)) < 1.1 * np.sqrt(np.mean((plain - exact) ** 2))


def test_pictures_of_the_package_go_by_strips(monkeypatch):
    """Drawing and encoding, as commands and runs do them, under jit."""
    vae = Vae(VaeConfig((4, 4), 1, 4, 2, 1.0, 0.0))
    params = random_parameters(vae)
    pipe = SimpleNamespace(vae=vae, vae_params=params)
    latents = jax.random.normal(jax.random.key(1), (2, 6, 4, 4))
    images = np.array(jax.random.uniform(jax.random.key(2), (2, 12, 8, 3)), np.float32)
    traced = by_strips(monkeypatch, 10**6)
    drawn, encoded = sampling.decode(pipe, latents), contexts.image_latents(pipe, images)
    assert traced == ["decode", "encode"]
    monkeypatch.setattr(vae_strips, "WHOLE", float("inf"))
    np.testing.assert_allclose(
        encoded, run(vae, params, "encode_mode", images), rtol=1e-5, atol=1e-5
    )
    apart = drawn.astype(int) - to_uint8(run(vae, params, "decode_normalised", latents))
    assert np.abs(apart).max() <= 1
    assert len(traced) == 2


def test_only_large_pictures_go_by_strips():
    width = VaeConfig.z_image().block_out_channels[0]
    assert not vae_strips.wanted(512, 512, width, jnp.float32)
    assert vae_strips.wanted(1024, 1024, width, jnp.float32)
    assert vae_strips.wanted(768, 1344, width, jnp.bfloat16)
