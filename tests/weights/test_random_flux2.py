"""The tiny random FLUX.2-klein opens in diffusers and transformers as the published one does."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from dopsd_jax import weights
from dopsd_jax.core import trees
from dopsd_jax.weights.load import weight_files
from dopsd_jax.weights.random_flux2 import write_random_flux2

PARTS = {
    "transformer": diffusers.Flux2Transformer2DModel,
    "vae": diffusers.AutoencoderKLFlux2,
    "text_encoder": transformers.Qwen3ForCausalLM,
}
NOT_STORED = {"lm_head.weight"}  # tied


def tensors(directory):
    return {k: v for f in weight_files(directory) for k, v in load_file(f).items()}


@pytest.mark.parametrize("part", PARTS)
def test_every_tensor_is_used_and_none_is_missing(tiny_flux2, part):
    model, info = PARTS[part].from_pretrained(tiny_flux2 / part, output_loading_info=True)
    assert not list(info["missing_keys"]) and not list(info["unexpected_keys"])
    stored = tensors(tiny_flux2 / part)
    assert set(model.state_dict()) - set(stored) <= NOT_STORED
    for name, value in stored.items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), value)
        assert np.abs(value).max() > 0
    if part != "text_encoder":  # the files leave no key to a class default
        own = {k for k in model.config if not k.startswith("_")}
        config = json.loads((tiny_flux2 / part / "config.json").read_text())
        assert own == {k for k in config if not k.startswith("_")}


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path, tiny_flux2):
    again = write_random_flux2(tmp_path / "a")
    other = write_random_flux2(tmp_path / "b", seed=1)
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (again / file).read_bytes() == (tiny_flux2 / file).read_bytes()
    assert (again / file).read_bytes() != (other / file).read_bytes()
    with pytest.raises(FileExistsError, match="flux2_klein_tiny: exists already"):
        write_random_flux2(tmp_path / "a")


def test_the_directory_loads_in_bfloat16_and_its_vae_in_float32(tiny_flux2):
    pipe = weights.load_pipeline(tiny_flux2)
    dtypes = {x.dtype for x in jax.tree.leaves([pipe.params, pipe.text_params])}
    assert dtypes == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(pipe.vae_params)} == {jnp.dtype("float32")}
    assert pipe.sample_size == 64 and pipe.denoiser.pixel_multiple == 16
    assert pipe.text_encoder.depth == 27  # the last tap; the 28th layer is never read
    assert pipe.denoiser.latent_shape(32, 48) == (2, 3, 16)
    with pytest.raises(ValueError, match="multiples of 16, got 40x48"):
        pipe.denoiser.latent_shape(40, 48)


def test_parts_that_are_not_asked_for_are_not_read(tiny_flux2):
    pipe = weights.load_pipeline(tiny_flux2, parts=("vae",))
    assert pipe.params is None and pipe.text_params is None
    assert trees.count(pipe.vae_params) > 0


def change(directory, file, **values):
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "file,values,message",
    [("model_index.json", {"_class_name": "FluxPipeline"},
      r"model_index.json: expected one of ZImagePipeline, Flux2KleinPipeline, got 'FluxPipeline'"),
     ("scheduler/scheduler_config.json", {"use_dynamic_shifting": False},
      r"scheduler_config.json: use_dynamic_shifting: expected True, got False"),
     ("scheduler/scheduler_config.json", {"time_shift_type": "linear"},
      "time_shift_type: expected 'exponential', got 'linear'"),
     ("transformer/config.json", {"guidance_embeds": True},
      r"transformer/config.json: .*guidance_embeds: expected False, got True"),
     ("transformer/config.json", {"in_channels": 8, "joint_attention_dim": 64},
      "the VAE has 16 latent channels, the transformer takes 8; "
      "the text features are 96 wide, the transformer takes 64"),
     ("text_encoder/config.json", {"num_hidden_layers": 26},
      r"the text encoder has 26 layers, its features are taken after layers \(9, 18, 27\)"),
     ("vae/config.json", {"patch_size": [4, 4]},
      r"vae/config.json: .*patch_size: expected \[2, 2")],
)
def test_what_does_not_fit_is_named_with_its_file(tmp_path, file, values, message):
    directory = write_random_flux2(tmp_path)
    change(directory, file, **values)
    with pytest.raises(weights.WeightsError, match=message):
        weights.load_pipeline(directory, parts=())


def test_its_files_tell_whether_a_model_is_distilled(tmp_path):
    """What is said of it where it is drawn with: see tests/test_guidance.py."""
    directory = write_random_flux2(tmp_path)
    assert weights.load_pipeline(directory, parts=()).distilled
    change(directory, "model_index.json", is_distilled=False)
    assert not weights.load_pipeline(directory, parts=()).distilled
