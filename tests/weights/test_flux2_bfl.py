"""FLUX.2 in its makers' single file: read as the diffusers directory is, and named back."""

import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.numpy import load_file, save_file

from dopsd_jax.core import trees
from dopsd_jax.models.flux2 import Flux2Config, Flux2Transformer
from dopsd_jax.weights import WeightsError, load_pipeline
from dopsd_jax.weights.flux2_names import flux2_bfl_table, flux2_table
from dopsd_jax.weights.load import load_tree
from dopsd_jax.weights.names import export_names
from dopsd_jax.weights.shapes import transformer_shapes

D, TEXT, C, M = 48, 96, 16, 144  # widths of the tiny pipeline: model, text, latents, feed-forward


def bfl_shapes(double=2, single=3, head=16):
    """Names and shapes of the makers' file, written out, not taken from the tables tested."""
    shapes = {
        "img_in.weight": (D, C), "txt_in.weight": (D, TEXT),
        "time_in.in_layer.weight": (D, 256), "time_in.out_layer.weight": (D, D),
        "double_stream_modulation_img.lin.weight": (6 * D, D),
        "double_stream_modulation_txt.lin.weight": (6 * D, D),
        "single_stream_modulation.lin.weight": (3 * D, D),
        "final_layer.linear.weight": (C, D), "final_layer.adaLN_modulation.1.weight": (2 * D, D),
    }
    for block in (f"double_blocks.{i}" for i in range(double)):
        for s in ("img", "txt"):
            shapes |= {
                f"{block}.{s}_attn.qkv.weight": (3 * D, D),
                f"{block}.{s}_attn.proj.weight": (D, D),
                f"{block}.{s}_attn.norm.query_norm.scale": (head,),
                f"{block}.{s}_attn.norm.key_norm.scale": (head,),
                f"{block}.{s}_mlp.0.weight": (2 * M, D), f"{block}.{s}_mlp.2.weight": (D, M),
            }
    for block in (f"single_blocks.{i}" for i in range(single)):
        shapes |= {
            f"{block}.linear1.weight": (3 * D + 2 * M, D), f"{block}.linear2.weight": (D, D + M),
            f"{block}.norm.query_norm.scale": (head,), f"{block}.norm.key_norm.scale": (head,),
        }
    return shapes


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in bfl_shapes().items()}


@pytest.fixture(scope="module")
def folder(tiny_flux2, tensors, tmp_path_factory):
    """The tiny pipeline with the makers' file in place of the transformer's tensors."""
    folder = tmp_path_factory.mktemp("bfl") / "model"
    shutil.copytree(tiny_flux2, folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    save_file(tensors, folder / "transformer" / "flux-2-klein-tiny.safetensors")
    return folder


def load(folder):
    return load_pipeline(folder, dtype="float32", parts=("transformer",)).params


def test_loads_as_what_diffusers_makes_of_it(folder, tensors, tmp_path):
    torch_tensors = {name: torch.from_numpy(x.copy()) for name, x in tensors.items()}
    converted = convert_flux2_transformer_checkpoint_to_diffusers(torch_tensors)
    shutil.copytree(folder, tmp_path / "diffusers")
    (tmp_path / "diffusers" / "transformer" / "flux-2-klein-tiny.safetensors").unlink()
    save_file({k: v.contiguous().numpy() for k, v in converted.items()},
              tmp_path / "diffusers" / "transformer" / "diffusion_pytorch_model.safetensors")
    want, got = trees.flatten(load(tmp_path / "diffusers")), trees.flatten(load(folder))
    assert want.keys() == got.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x)


def test_a_file_beside_the_folders_is_found(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "flux-2-klein-tiny.safetensors"
    file.rename(tmp_path / "model" / file.name)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model"), load(folder))


def test_names_of_the_other_direction_give_the_file_again(folder, tensors):
    config = load_pipeline(folder, parts=()).denoiser.network.config
    flat = trees.flatten(load(folder))
    again = export_names(flux2_bfl_table(config), tensors, flat)
    assert again.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(again[name], x)


def test_norms_may_be_called_weights(folder, tensors, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "flux-2-klein-tiny.safetensors"
    save_file({n.replace("_norm.scale", "_norm.weight"): x for n, x in load_file(file).items()},
              file)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model"), load(folder))


@pytest.mark.parametrize("change,words", [
    (lambda t: t.pop("double_blocks.1.txt_attn.qkv.weight"),
     "parameter transformer_blocks/attn/add_q_proj/kernel, layers [1]: no tensor in the files"),
    (lambda t: t.update({"double_blocks.0.img_attn.qkv.weight": np.zeros((3 * D + 1, D), "f4")}),
     "double_blocks.0.img_attn.qkv.weight: expected exactly one rule"),
    (lambda t: t.update({"x_embedder.weight": np.zeros((D, C), "f4")}),
     "parameter x_embedder/kernel is already filled by"),
])
def test_what_does_not_fit_is_named(tensors, tmp_path, change, words):
    changed = dict(tensors)
    change(changed)
    save_file(changed, tmp_path / "x.safetensors")
    config = Flux2Config(2, 3, 3, TEXT, C, 16, axes_dims_rope=(4, 4, 4, 4))
    shapes = transformer_shapes(Flux2Transformer(config))
    table = [*flux2_table(config), *flux2_bfl_table(config)]
    with pytest.raises(WeightsError) as e:
        load_tree([tmp_path / "x.safetensors"], table, shapes)
    assert words in str(e.value)
