"""Full weights of a run, opened by diffusers."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel

from dopsd_jax import export as export_lib
from dopsd_jax.core import trees
from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.families import transformer_table
from dopsd_jax.weights.load import load_tree, weight_files
from dopsd_jax.weights.names import WeightsError
from dopsd_jax.weights.pipeline import load_pipeline
from dopsd_jax.weights.save import write_component
from dopsd_jax.weights.shapes import transformer_shapes


@pytest.fixture(scope="module")
def pipe(tiny):
    return load_pipeline(tiny.pipeline, dtype="float32", parts=("transformer",))


@pytest.fixture
def trained(pipe):
    """The weights, each parameter moved by another amount."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(x) + 0.01 * rng.standard_normal(x.shape, np.float32), pipe.params
    )


@pytest.fixture
def run(tiny, trained, tmp_path):
    workdir = tmp_path / "run"
    workdir_lib.claim(workdir, {"model": str(tiny.pipeline), "trainable": "full",
                                "teacher": "ema", "lora": {"rank": 2, "alpha": 4.0}}, {})
    checkpoints = Checkpoints(workdir / "checkpoints")
    half = jax.tree.map(lambda x: x / 2, trained)
    checkpoints.save(5, {"student": trained, "teacher": half}, {"step": 5})
    checkpoints.close()
    return workdir


def in_diffusers(directory, pipe, seed=0):
    c = pipe.denoiser.network.config
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((c.in_channels, 1, 8, 8), np.float32)
    text = rng.standard_normal((37, c.cap_feat_dim), np.float32)
    model = ZImageTransformer2DModel.from_pretrained(directory).eval()
    with torch.no_grad():
        out = model([torch.from_numpy(x)], torch.tensor([0.3]), [torch.from_numpy(text)],
                    return_dict=False)[0][0]
    ours = np.pad(text, ((0, 64 - 37), (0, 0)))[None]
    return out[:, 0].permute(1, 2, 0).numpy(), (
        x[:, 0].transpose(1, 2, 0)[None], np.float32([0.3]), ours, np.arange(64)[None] < 37)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_diffusers_computes_the_same_with_the_exported_weights(run, pipe, trained, tmp_path, role):
    out = tmp_path / "transformer"
    export_lib.export(run, "diffusers", out, role=role)
    want, inputs = in_diffusers(out, pipe)
    params = trained if role == "student" else jax.tree.map(lambda x: x / 2, trained)
    got = np.asarray(pipe.denoiser.network.apply({"params": params}, *inputs))[0]
    assert np.abs(got - want).max() / np.abs(want).max() < 2e-5
    untrained, _ = in_diffusers(pipe.directory / "transformer", pipe)
    assert np.abs(untrained - want).max() / np.abs(want).max() > 1e-3


def test_shards_have_an_index_and_read_back_bit_for_bit(pipe, trained, tmp_path):
    out, table = tmp_path / "transformer", transformer_table(pipe.denoiser)
    files = write_component(
        out, pipe.directory / "transformer" / "config.json", table, trained, shard_bytes=1_100_000
    )
    assert len(files) > 1 and all(f.stat().st_size < 1_200_000 for f in files)
    index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    back = load_tree(weight_files(out), table, transformer_shapes(pipe.denoiser.network))
    for name, x in trees.flatten(back).items():
        np.testing.assert_array_equal(x, trees.flatten(trained)[name], err_msg=name)
    in_diffusers(out, pipe)  # opens all shards


def test_ours_is_replaced_and_others_only_when_told(pipe, trained, tmp_path):
    out, table = tmp_path / "transformer", transformer_table(pipe.denoiser)
    folder = pipe.directory / "transformer"
    source = folder / "config.json"
    write_component(out, source, table, trained)
    write_component(out, source, table, trained)
    ZImageTransformer2DModel.from_pretrained(folder).save_pretrained(out)
    with pytest.raises(WeightsError, match="not written here; --overwrite replaces them"):
        write_component(out, source, table, trained)
    write_component(out, source, table, trained, overwrite=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(WeightsError, match="holds notes.txt; choose a new directory"):
        write_component(out, source, table, trained, overwrite=True)


def test_what_cannot_be_exported_is_said(run, pipe, trained, tmp_path):
    with pytest.raises(ValueError, match="expected diffusers for a run with tr.*, got 'p"):
        export_lib.export(run, "peft", tmp_path / "x")
    del trained["x_embedder"]["kernel"]
    table = transformer_table(pipe.denoiser)
    with pytest.raises(WeightsError, match="x_embedder/kernel: the tree has no such parameter"):
        write_component(tmp_path / "x", pipe.directory / "transformer" / "config.json", table,
                        trained)
    assert not (tmp_path / "x").exists()
