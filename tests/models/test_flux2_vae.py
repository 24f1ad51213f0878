"""The FLUX.2 VAE against diffusers' AutoencoderKLFlux2, through the real weight loader."""

from __future__ import annotations

import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors.numpy import load_file

from dopsd_jax.core import trees
from dopsd_jax.models.flux2_vae import Flux2Vae, Flux2VaeConfig, from_patches, to_patches
from dopsd_jax.weights.load import load_tree, weight_files
from dopsd_jax.weights.names import export_names, resolve
from dopsd_jax.weights.vae_names import flux2_vae_table

TINY = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(8, 16, 24, 24), layers_per_block=2, norm_num_groups=4, latent_channels=4,
    sample_size=64, patch_size=(2, 2), batch_norm_eps=1e-2,
)


def param_shapes(config: Flux2VaeConfig):
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return jax.eval_shape(Flux2Vae(config).init, jax.random.key(0), images)["params"]


@pytest.fixture(scope="module")
def oracle():
    """The tiny torch VAE; norms, biases and statistics, trivial at init, are random too."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(**TINY).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif re.search(r"to_[qk]", name):
            parameter.mul_(4)
    vae.bn.running_mean.normal_(0, 2)
    vae.bn.running_var.uniform_(0.001, 4)
    return vae


@pytest.fixture(scope="module")
def directory(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    oracle.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def config(directory):
    return Flux2VaeConfig.from_json(json.loads((directory / "config.json").read_text()))


@pytest.fixture(scope="module")
def params(directory, config):
    return load_tree(weight_files(directory), flux2_vae_table(config), param_shapes(config))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(2).standard_normal((2, 2, 3, 16)).astype(np.float32)


def run(config, params, method, x, dtype=jnp.float32):
    vae = Flux2Vae(config, dtype)
    apply = jax.jit(lambda params, x: vae.apply({"params": params}, x, method=method))
    return np.asarray(apply(params, x).astype(jnp.float32))


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.float().permute(0, 2, 3, 1).numpy()


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def decode_torch(vae, z: torch.Tensor) -> torch.Tensor:
    """The end of Flux2KleinPipeline.__call__, where nothing is a function to call."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(z.dtype)
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    z = Flux2KleinPipeline._unpatchify_latents(z * deviation.to(z.dtype) + mean)
    return vae.decode(z).sample


def test_encode_gives_the_moments_of_diffusers(oracle, config, params, images):
    want = to_numpy(oracle.encode(to_torch(images)).latent_dist.parameters)
    assert relative_error(run(config, params, "encode", images), want) < 2e-5


def test_decode_gives_the_images_of_diffusers(oracle, config, params):
    raw = 3 * np.random.default_rng(3).standard_normal((2, 4, 6, 4)).astype(np.float32)
    want = to_numpy(oracle.decode(to_torch(raw)).sample)
    assert relative_error(run(config, params, "decode", raw), want) < 2e-5


def test_encode_mode_gives_the_latents_of_the_pipeline(oracle, config, params, images):
    pipe = Flux2KleinPipeline(None, oracle, None, None, None)
    want = to_numpy(pipe._encode_vae_image(to_torch(images), None))
    assert relative_error(run(config, params, "encode_mode", images), want) < 2e-5


def test_decode_normalised_gives_the_images_of_the_pipeline(oracle, config, params, latents):
    want = to_numpy(decode_torch(oracle, to_torch(latents)))
    assert relative_error(run(config, params, "decode_normalised", latents), want) < 2e-5


def test_bfloat16_decode_is_as_close_to_float32_as_torch_is(oracle, config, params, latents):
    exact = to_numpy(decode_torch(oracle, to_torch(latents)))
    half = diffusers.AutoencoderKLFlux2(**TINY).eval().requires_grad_(False)
    half.load_state_dict(oracle.state_dict())
    theirs = to_numpy(decode_torch(half.to(torch.bfloat16), to_torch(latents).bfloat16()))
    half_params = trees.cast_floats(params, jnp.bfloat16)
    ours = run(config, half_params, "decode_normalised", latents, jnp.bfloat16)

    def rms(a):
        return float(np.sqrt(np.mean((a - exact) ** 2) / np.mean(exact**2)))

    assert rms(theirs) > 0.003, "the oracle no longer runs in bfloat16"
    # Measured 0.0253, torch 0.0242: more than Z-Image's, because a variance here may be small.
    assert rms(ours) < 0.03, (rms(ours), rms(theirs))


def test_patches_are_those_of_the_pipeline():
    z = np.random.default_rng(4).standard_normal((2, 4, 6, 3)).astype(np.float32)
    patches = np.asarray(to_patches(jnp.asarray(z)))
    want = to_numpy(Flux2KleinPipeline._patchify_latents(to_torch(z)))
    np.testing.assert_array_equal(patches, want)
    np.testing.assert_array_equal(from_patches(jnp.asarray(patches)), z)


def test_loaded_parameters_export_as_the_same_tensors(directory, config, params):
    tensors = load_file(directory / "diffusion_pytorch_model.safetensors")
    assert tensors.pop("bn.num_batches_tracked").dtype == np.int64
    exported = export_names(flux2_vae_table(config), tensors, trees.flatten(params))
    assert exported.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_full_size_has_the_published_parameters_and_names():
    config = Flux2VaeConfig.klein()
    shapes = {name: leaf.shape for name, leaf in trees.flatten(param_shapes(config)).items()}
    assert trees.count(param_shapes(config)) == 84_046_115 + 2 * 128  # the statistics
    with torch.device("meta"):
        tensors = diffusers.AutoencoderKLFlux2().state_dict()
    assert len(tensors) == 251
    slots, problems = resolve(flux2_vae_table(config), tensors)
    assert problems == []
    got = {
        slot.name: slot.transform.to_flax(np.broadcast_to(np.int8(0), tensors[name].shape)).shape
        for name, slot in slots.items()
    }
    assert len(got) == 250
    assert got == shapes


def test_from_json_lists_everything_it_does_not_support():
    values = dict(TINY, use_quant_conv=False, patch_size=[4, 4], scaling_factor=1.0,
                  decoder_block_out_channels=[8, 8], _class_name="AutoencoderKL")
    with pytest.raises(ValueError) as e:
        Flux2VaeConfig.from_json(values)
    for part in [
        "use_quant_conv: expected True, got False", "patch_size: expected [2, 2], got [4, 4]",
        "unknown keys ['scaling_factor']", "decoder_block_out_channels: expected None",
        "_class_name: expected 'AutoencoderKLFlux2', got 'AutoencoderKL'",
    ]:
        assert part in str(e.value)


def test_sizes_that_do_not_make_whole_patches_are_named(config):
    images = jax.ShapeDtypeStruct((1, 32, 40, 3), jnp.float32)
    with pytest.raises(ValueError, match="multiples of 16, got 32x40"):
        jax.eval_shape(Flux2Vae(config).init, jax.random.key(0), images)
    with pytest.raises(ValueError, match="B h w 16"):
        jax.eval_shape(
            lambda z: Flux2Vae(config).init(jax.random.key(0), z, method="decode_normalised"),
            jax.ShapeDtypeStruct((1, 2, 2, 4), jnp.float32),
        )
