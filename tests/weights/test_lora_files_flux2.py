"""LoRA files of FLUX.2: read by PEFT and diffusers, named for ComfyUI, and read back here."""

import copy
import re

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from peft import PeftModel
from safetensors.numpy import load_file
from test_lora_files import adapted

from dopsd_jax import sample
from dopsd_jax.core import trees
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.models.flux2 import Flux2Config
from dopsd_jax.weights import load_pipeline
from dopsd_jax.weights.families import family_of_tree
from dopsd_jax.weights.flux2 import FLUX2
from dopsd_jax.weights.flux2_names import FLUX2_TARGETS
from dopsd_jax.weights.lora_files import (
    FORMATS,
    LoraSpec,
    read_lora,
    save_comfyui,
    save_diffusers,
    save_peft,
)
from dopsd_jax.weights.shapes import transformer_shapes
from dopsd_jax.weights.z_image import Z_IMAGE

FLUX2_MODULES = FLUX2.modules(Flux2Config.klein_4b())

SPEC = LoraSpec(rank=3, alpha=7.0, base_model="some/model")
# Linears of a block, torch name -> tree path; written out, not taken from the code tested.
DOUBLE = {
    "attn.to_q": "attn/to_q", "attn.to_k": "attn/to_k", "attn.to_v": "attn/to_v",
    "attn.to_out.0": "attn/to_out", "attn.add_q_proj": "attn/add_q_proj",
    "attn.add_k_proj": "attn/add_k_proj", "attn.add_v_proj": "attn/add_v_proj",
    "attn.to_add_out": "attn/to_add_out",
}
FEED_FORWARD = {
    f"{ff}.{p}": f"{ff}/{p}" for ff in ("ff", "ff_context") for p in ("linear_in", "linear_out")
}
SINGLE = {p: p.replace(".", "/") for p in ("attn.to_qkv_mlp_proj", "attn.to_out")}
SITES = {
    "published": {"transformer_blocks": DOUBLE},
    "all": {"transformer_blocks": DOUBLE | FEED_FORWARD, "single_transformer_blocks": SINGLE},
}
LAYERS = {"transformer_blocks": 2, "single_transformer_blocks": 3}


@pytest.fixture(scope="module")
def base(tiny_flux2):
    return Flux2Transformer2DModel.from_pretrained(tiny_flux2 / "transformer").eval()


@pytest.fixture(scope="module")
def shapes(tiny_flux2):
    return transformer_shapes(load_pipeline(tiny_flux2, parts=()).denoiser.network)


def random_lora(shapes, preset, rank=3):
    """Random a and b on the Linears of a preset."""
    names = lora_lib.match_targets(shapes, FLUX2_TARGETS[preset])
    made = jax.eval_shape(lambda: lora_lib.init(jax.random.key(0), shapes, names, rank))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), made)


def torch_sites(lora, preset):
    """{torch module name: (a [in, r], b [r, out])}, by the lists above."""
    flat = trees.flatten(lora)
    return {
        f"{stack}.{i}.{module}": tuple(flat[f"{stack}/{path}/{leaf}"][i] for leaf in "ab")
        for stack, modules in SITES[preset].items() for module, path in modules.items()
        for i in range(LAYERS[stack])
    }


def run(model):
    g = torch.Generator().manual_seed(0)
    one = torch.arange(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(2, 6, 16, generator=g),
            encoder_hidden_states=torch.randn(2, 5, 96, generator=g),
            timestep=torch.tensor([0.9, 0.3]),
            img_ids=torch.cartesian_prod(one, torch.arange(2), torch.arange(3), one),
            txt_ids=torch.cartesian_prod(one, one, one, torch.arange(5)), return_dict=False,
        )[0].numpy()


def assert_same_picture(got, base, sites):
    """As with alpha / rank a b added to the weights by hand, in float64."""
    merged = copy.deepcopy(base)
    for module, (a, b) in sites.items():
        weight = merged.get_submodule(module).weight
        delta = 7 / 3 * (a.astype(np.float64) @ b.astype(np.float64))
        weight.data = (weight.data.double() + torch.from_numpy(delta).T).float()
    want, before = run(merged), run(base)
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-5
    assert np.abs(got - before).max() / np.abs(before).max() > 0.05


@pytest.mark.parametrize("preset", SITES)
def test_peft_loads_every_tensor_and_adapts_nothing_else(base, shapes, tmp_path, preset, recwarn):
    lora = random_lora(shapes, preset)
    save_peft(tmp_path / "lora", lora, SPEC, FLUX2_MODULES)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").base_model.model
    assert not [w for w in recwarn if "adapter" in str(w.message)]  # missing or unexpected keys
    found, sites = adapted(model), torch_sites(lora, preset)
    assert found.keys() == sites.keys()
    for module, (a, b) in sites.items():
        np.testing.assert_array_equal(found[module][0], a.T)
        np.testing.assert_array_equal(found[module][1], b.T)
        assert found[module][2] == 7 / 3
    assert_same_picture(run(model), base, sites)


def load_in_diffusers(base, file, caplog):
    """The transformer after `load_lora_weights`, and what was said of it."""
    pipe = Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None,
                              copy.deepcopy(base))
    diffusers.utils.logging.enable_propagation()  # else caplog sees none of its warnings
    try:
        pipe.load_lora_weights(file)
    finally:
        diffusers.utils.logging.disable_propagation()
    return pipe.transformer, [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("preset", SITES)
def test_diffusers_loads_every_tensor_and_adapts_nothing_else(
    base, shapes, tmp_path, preset, caplog
):
    lora = random_lora(shapes, preset)
    save_diffusers(tmp_path / "lora.safetensors", lora, SPEC, FLUX2_MODULES)
    model, said = load_in_diffusers(base, tmp_path / "lora.safetensors", caplog)
    assert not said
    found, sites = adapted(model), torch_sites(lora, preset)
    assert found.keys() == sites.keys()
    for module, (a, b) in sites.items():
        np.testing.assert_array_equal(found[module][0], a.T)
        np.testing.assert_allclose(found[module][1], 7 / 3 * b.T, rtol=2e-7)
        assert found[module][2] == 1
    assert_same_picture(run(model), base, sites)


def test_diffusers_refuses_a_file_with_alphas(base, shapes, tmp_path, caplog):
    """So nobody loads the file for ComfyUI there by mistake, as with the other family."""
    lora = random_lora(shapes, "published")
    save_comfyui(tmp_path / "lora.safetensors", lora, SPEC, FLUX2_MODULES)
    with pytest.raises(ValueError, match="Invalid adapter checkpoint"):
        load_in_diffusers(base, tmp_path / "lora.safetensors", caplog)


def comfyui_targets(width=48):
    """The names ComfyUI accepts, and the slice of which weight of its own each one patches.

    Rules of its Flux branch (`flux_to_diffusers` with the prefix transformer.): q, k and v are
    thirds of the rows of one fused weight, the rest is renamed.
    """
    accepted = {}
    for i in range(LAYERS["transformer_blocks"]):
        ours, own = f"transformer.transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, qkv, out, ff in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
        ):
            for third, name in enumerate(qkv):
                accepted[f"{ours}.attn.{name}"] = (f"{own}.{stream}_attn.qkv.weight", third * width)
            accepted[f"{ours}.attn.{out}"] = (f"{own}.{stream}_attn.proj.weight", 0)
            accepted[f"{ours}.{ff}.linear_in"] = (f"{own}.{stream}_mlp.0.weight", 0)
            accepted[f"{ours}.{ff}.linear_out"] = (f"{own}.{stream}_mlp.2.weight", 0)
    for i in range(LAYERS["single_transformer_blocks"]):
        ours, own = f"transformer.single_transformer_blocks.{i}", f"single_blocks.{i}"
        accepted[f"{ours}.attn.to_qkv_mlp_proj"] = (f"{own}.linear1.weight", 0)
        accepted[f"{ours}.attn.to_out"] = (f"{own}.linear2.weight", 0)
    return accepted


def test_comfyui_file_has_the_names_comfyui_maps(shapes, tmp_path):
    lora = random_lora(shapes, "all")
    save_comfyui(tmp_path / "lora.safetensors", lora, SPEC, FLUX2_MODULES)
    tensors = load_file(tmp_path / "lora.safetensors")
    parts = ("lora_A.weight", "lora_B.weight", "alpha")
    accepted = comfyui_targets()
    assert tensors.keys() == {f"{module}.{part}" for module in accepted for part in parts}
    assert all(tensors[f"{module}.alpha"] == np.float32(7) for module in accepted)

    # Patching ComfyUI's own weights by its rule gives the fused qkv of the merged torch weights.
    flat, fused = trees.flatten(lora), np.zeros((3 * 48, 48))
    for module, (weight, row) in accepted.items():
        if weight == "double_blocks.1.txt_attn.qkv.weight":
            a, b, alpha = (tensors[f"{module}.{part}"] for part in parts)
            fused[row : row + 48] = float(alpha) / a.shape[0] * (b @ a)
    names = [f"transformer_blocks/attn/add_{p}_proj" for p in "qkv"]
    expected = [(flat[f"{n}/a"][1] @ flat[f"{n}/b"][1]).T for n in names]
    np.testing.assert_allclose(fused, 7 / 3 * np.concatenate(expected), atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_is_read_back(shapes, tmp_path, form):
    lora = random_lora(shapes, "all")
    path = tmp_path / ("lora" if form == "peft" else "lora.safetensors")
    FORMATS[form](path, lora, SPEC, FLUX2_MODULES)
    got, spec = read_lora(path, FLUX2_MODULES, shapes)
    assert spec == SPEC
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-7), got, lora)


def test_sampling_with_a_file_is_sampling_with_the_tree(tiny_flux2, shapes, tmp_path):
    pipe = load_pipeline(tiny_flux2, dtype="float32")
    lora = random_lora(shapes, "all")
    save_comfyui(tmp_path / "lora.safetensors", lora, SPEC, FLUX2_MODULES)
    size = dict(num_steps=1, height=32, width=32)
    from_file = sample.generate(pipe, ["a fox"], **size, lora=tmp_path / "lora.safetensors")
    np.testing.assert_array_equal(
        from_file, sample.generate(pipe, ["a fox"], **size, lora=(lora, SPEC.scale))
    )
    assert (from_file != sample.generate(pipe, ["a fox"], **size)).any()


def test_names_are_those_of_every_linear_of_the_network(base):
    """Both directions: each torch Linear has one rule, each rule some torch Linear."""
    linears = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    rules_of = {n: [r for r in FLUX2_MODULES if re.fullmatch(r.pattern, n)] for n in linears}
    assert {len(rules) for rules in rules_of.values()} == {1}
    named = {r.target for r in FLUX2_MODULES if r.target is not None}
    assert {rules[0].target for rules in rules_of.values()} == named


def test_the_family_of_a_tree_is_told_by_its_names(shapes):
    assert family_of_tree(random_lora(shapes, "published")) is FLUX2
    pair = {"a": np.zeros((2, 4, 1)), "b": np.zeros((2, 1, 4))}
    assert family_of_tree({"layers": {"attention": {"to_q": pair}}}) is Z_IMAGE
