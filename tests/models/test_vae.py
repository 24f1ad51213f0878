"""The VAE against diffusers' AutoencoderKL, through the real weight loader."""

from __future__ import annotations

import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dopsd_jax.core import trees
from dopsd_jax.models.vae import Vae, VaeConfig
from dopsd_jax.weights.load import load_tree, weight_files
from dopsd_jax.weights.names import export_names, resolve
from dopsd_jax.weights.vae_names import vae_table

BLOCKS = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
TINY = dict(
    BLOCKS, block_out_channels=(8, 16, 24, 24), norm_num_groups=4, latent_channels=4,
    sample_size=64,
)
FULL = dict(
    BLOCKS, block_out_channels=(128, 256, 512, 512), norm_num_groups=32, latent_channels=16,
    sample_size=1024,
)


@pytest.fixture(scope="module", autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def param_shapes(config: VaeConfig):
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return jax.eval_shape(Vae(config).init, jax.random.key(0), images)["params"]


@pytest.fixture(scope="module")
def oracle():
    """The tiny torch VAE; norms and biases, trivial at init, are random too."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**TINY).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif re.search(r"to_[qk]", name):
            parameter.mul_(4)  # so that attention is far from uniform
    return vae


@pytest.fixture(scope="module")
def directory(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    oracle.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def config(directory):
    return VaeConfig.from_json(json.loads((directory / "config.json").read_text()))


@pytest.fixture(scope="module")
def params(directory, config):
    return load_tree(weight_files(directory), vae_table(config), param_shapes(config))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def latents():
    return 3 * np.random.default_rng(2).standard_normal((2, 4, 6, 4)).astype(np.float32)


def run(config, params, method, x, dtype=jnp.float32):
    vae = Vae(config, dtype)
    apply = jax.jit(lambda params, x: vae.apply({"params": params}, x, method=method))
    return np.asarray(apply(params, x).astype(jnp.float32))


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.float().permute(0, 2, 3, 1).numpy()


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_encode_gives_the_moments_of_diffusers(oracle, config, params, images):
    # `parameters` is before the clamp of the log variance, as Vae.encode is.
    want = to_numpy(oracle.encode(to_torch(images)).latent_dist.parameters)
    assert relative_error(run(config, params, "encode", images), want) < 2e-5


def test_encode_mode_is_shifted_then_scaled(oracle, config, params, images):
    mode = to_numpy(oracle.encode(to_torch(images)).latent_dist.mode())
    want = (mode - 0.1159) * 0.3611
    assert relative_error(run(config, params, "encode_mode", images), want) < 2e-5


def test_decode_gives_the_images_of_diffusers(oracle, config, params, latents):
    want = to_numpy(oracle.decode(to_torch(latents)).sample)
    assert relative_error(run(config, params, "decode", latents), want) < 2e-5


def test_decode_normalised_undoes_scale_then_shift(oracle, config, params, latents):
    want = to_numpy(oracle.decode(to_torch(latents) / 0.3611 + 0.1159).sample)
    assert relative_error(run(config, params, "decode_normalised", latents), want) < 2e-5


def test_bfloat16_decode_is_as_close_to_float32_as_torch_is(oracle, config, params, latents):
    exact = to_numpy(oracle.decode(to_torch(latents)).sample)
    half = diffusers.AutoencoderKL(**TINY).eval()
    half.load_state_dict(oracle.state_dict())
    half = half.to(torch.bfloat16)
    with torch.no_grad():
        theirs = to_numpy(half.decode(to_torch(latents).bfloat16()).sample)
    half_params = trees.cast_floats(params, jnp.bfloat16)
    ours = run(config, half_params, "decode", latents, jnp.bfloat16)

    def rms(a, b):
        return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(exact**2)))

    # Measured, relative rms: ours to float32 0.0076, torch bfloat16 to float32 0.0067, ours to
    # torch bfloat16 0.0092.
    assert rms(theirs, exact) > 0.003, "the oracle no longer runs in bfloat16"
    assert rms(ours, exact) < 0.011
    assert rms(ours, theirs) < 0.013


def test_loaded_parameters_export_as_the_same_tensors(directory, config, params):
    tensors = load_file(directory / "diffusion_pytorch_model.safetensors")
    exported = export_names(vae_table(config), tensors, trees.flatten(params))
    assert exported.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_full_size_has_the_published_parameter_count():
    assert trees.count(param_shapes(VaeConfig.z_image())) == 83_819_683


def test_every_full_size_tensor_has_its_parameter():
    with torch.device("meta"):
        tensors = diffusers.AutoencoderKL(**FULL).state_dict()
    assert len(tensors) == 244
    config = VaeConfig.z_image()
    slots, problems = resolve(vae_table(config), tensors)
    assert problems == []
    got = {
        slot.name: slot.transform.to_flax(np.broadcast_to(np.int8(0), tensors[name].shape)).shape
        for name, slot in slots.items()
    }
    assert len(got) == 244
    assert got == {name: leaf.shape for name, leaf in trees.flatten(param_shapes(config)).items()}


def test_full_size_config_is_that_of_the_published_json():
    # The keys and values of Tongyi-MAI/Z-Image-Turbo/vae/config.json.
    published = dict(FULL, _class_name="AutoencoderKL", act_fn="silu", in_channels=3,
                     out_channels=3, force_upcast=True, latents_mean=None, latents_std=None,
                     mid_block_add_attention=True, _diffusers_version="0.30.0.dev0")
    assert VaeConfig.from_json(json.loads(json.dumps(published))) == VaeConfig.z_image()


def test_from_json_lists_everything_it_does_not_support():
    values = dict(TINY, use_quant_conv=True, act_fn="relu", mid_block_add_attention=False,
                  up_block_types=["AttnUpDecoderBlock2D"] * 4, latents_mean=[0.0], patch_size=2,
                  norm_num_groups=5)
    del values["use_post_quant_conv"]
    with pytest.raises(ValueError) as e:
        VaeConfig.from_json(values)
    message = str(e.value)
    for part in [
        "use_quant_conv: expected False, got True",
        "use_post_quant_conv: expected False, got True (absent, the default of diffusers)",
        "act_fn: expected 'silu', got 'relu'",
        "mid_block_add_attention: expected True, got False",
        "up_block_types: expected ['UpDecoderBlock2D', ",
        "latents_mean: expected None, got [0.0]",
        "norm_num_groups: 5 does not divide each width of [8, 16, 24, 24]",
        "unknown keys ['patch_size']",
    ]:
        assert part in message
    assert "down_block_types" not in message


def test_encode_refuses_sizes_it_would_crop(config):
    images = jax.ShapeDtypeStruct((1, 32, 44, 3), jnp.float32)
    with pytest.raises(ValueError, match="multiples of 8, got 32x44"):
        jax.eval_shape(Vae(config).init, jax.random.key(0), images)
