"""LoRA files: read by PEFT and diffusers, named for ComfyUI, and read back here."""

import copy
import json
import re
import stat

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from lora_examples import (
    BLOCK,
    LAYERS,
    SPEC,
    Z_IMAGE_MODULES,
    every_linear,
    random_lora,
    run,
    shapes_of,
    tiny_model,
    torch_file,
    torch_sites,
)
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dopsd_jax.core import trees
from dopsd_jax.weights.lora_files import (
    FORMATS,
    LoraSpec,
    read_lora,
    save_comfyui,
    save_diffusers,
    save_peft,
)


@pytest.fixture(scope="module")
def base():
    return tiny_model()


def run_merged(base, lora, spec):
    """The same with alpha / rank a b added to the weights by hand, in float64."""
    model = copy.deepcopy(base)
    for module, (a, b) in torch_sites(lora).items():
        weight = model.get_submodule(module).weight
        delta = spec.alpha / spec.rank * (a.astype(np.float64) @ b.astype(np.float64))
        weight.data = (weight.data.double() + torch.from_numpy(delta).T).float()
    return run(model)


def assert_same_picture(got, base, lora, spec):
    merged, before = run_merged(base, lora, spec), run(base)
    assert np.abs(got - merged).max() / np.abs(merged).max() < 1e-5
    assert np.abs(got - before).max() / np.abs(before).max() > 0.05


def adapted(model):
    """{module: (A, B, scale)} of the modules that PEFT has wrapped in `model`."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            (adapter,) = module.lora_A.keys()
            found[name] = (
                module.lora_A[adapter].weight.detach().numpy(),
                module.lora_B[adapter].weight.detach().numpy(),
                module.scaling[adapter],
            )
    return found


WHICH = {
    "published": lambda: random_lora(BLOCK),
    "layers_only": lambda: random_lora(BLOCK, stacks={"layers": 2}),
    "every_linear": every_linear,
}


@pytest.mark.parametrize("which", WHICH)
def test_peft_loads_every_tensor_and_adapts_nothing_else(base, tmp_path, which, recwarn):
    lora = WHICH[which]()
    save_peft(tmp_path / "lora", lora, SPEC, Z_IMAGE_MODULES)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    assert not [w for w in recwarn if "adapter" in str(w.message)]  # missing or unexpected keys

    found, sites = adapted(model.base_model.model), torch_sites(lora)
    assert found.keys() == sites.keys()
    for module, (a, b) in sites.items():
        np.testing.assert_array_equal(found[module][0], a.T)
        np.testing.assert_array_equal(found[module][1], b.T)
        assert found[module][2] == 7 / 3
    assert get_peft_model_state_dict(model).keys() == load_file(
        tmp_path / "lora" / "adapter_model.safetensors"
    ).keys()
    assert_same_picture(run(model.base_model.model), base, lora, SPEC)


def test_peft_targets_are_suffixes_only_where_every_stack_is_adapted(tmp_path):
    def targets(stacks):
        save_peft(tmp_path / "lora", random_lora(BLOCK, stacks=stacks), SPEC, Z_IMAGE_MODULES)
        return json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"]

    assert targets(LAYERS) == sorted(BLOCK)
    # The suffix adaLN_modulation.0 would hit a SiLU of the final layer too.
    save_peft(tmp_path / "all", every_linear(), SPEC, Z_IMAGE_MODULES)
    names = json.loads((tmp_path / "all" / "adapter_config.json").read_text())["target_modules"]
    assert {n for n in names if "adaLN" in n} == {
        "layers.0.adaLN_modulation.0", "layers.1.adaLN_modulation.0",
        "noise_refiner.0.adaLN_modulation.0", "all_final_layer.2-1.adaLN_modulation.1",
    }
    assert targets({"layers": 2}) == sorted(f"layers.{i}.{m}" for i in range(2) for m in BLOCK)


def test_peft_config_says_what_a_reader_of_the_directory_needs(tmp_path):
    save_peft(tmp_path / "lora", random_lora(BLOCK), SPEC, Z_IMAGE_MODULES)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": sorted(BLOCK),
        "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True, "inference_mode": True,
        "task_type": None, "base_model_name_or_path": "some/model",
    }
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "np") as f:
        assert f.metadata()["format"] == "pt"


@pytest.mark.parametrize("save", [save_diffusers, save_comfyui])
@pytest.mark.parametrize("which", WHICH)
def test_diffusers_loads_every_tensor_and_adapts_nothing_else(base, tmp_path, save, which, caplog):
    lora = WHICH[which]()
    save(tmp_path / "lora.safetensors", lora, SPEC, Z_IMAGE_MODULES)
    pipe = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(), None, None, None, copy.deepcopy(base)
    )
    diffusers.utils.logging.enable_propagation()  # else caplog sees none of its warnings
    try:
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
    finally:
        diffusers.utils.logging.disable_propagation()
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]

    found, sites = adapted(pipe.transformer), torch_sites(lora)
    assert found.keys() == sites.keys()
    for module, (a, b) in sites.items():
        got_a, got_b, scale = found[module]
        assert scale == 1
        in_b, in_a = (7 / 3, 1) if save is save_diffusers else (1, 7 / 3)
        np.testing.assert_allclose(got_a, in_a * a.T, rtol=2e-7)
        np.testing.assert_allclose(got_b, in_b * b.T, rtol=2e-7)
    assert_same_picture(run(pipe.transformer), base, lora, SPEC)


def test_diffusers_file_keeps_alpha_where_other_tools_do_not_look(tmp_path):
    save_diffusers(tmp_path / "lora.safetensors", random_lora(BLOCK), SPEC, Z_IMAGE_MODULES)
    with safe_open(tmp_path / "lora.safetensors", "np") as f:
        metadata, keys = f.metadata(), list(f.keys())
    assert not [k for k in keys if "alpha" in k]
    assert metadata.keys() == {"format", "dopsd_jax_lora"}  # diffusers reads lora_adapter_metadata
    assert metadata["format"] == "pt"
    assert json.loads(metadata["dopsd_jax_lora"]) == {
        "rank": 3, "alpha": 7.0, "base_model": "some/model", "scale_in_b": True
    }


def comfyui_targets(width=64):
    """The names ComfyUI accepts, and the slice of which weight of its own each one patches.

    Rules of its Lumina2 branch: names in diffusers' layout, prefix diffusion_model. (or
    transformer., lycoris_, none); q, k and v are thirds of the rows of one fused weight; the
    output projection has another name; the rest is called the same.
    """
    accepted = {}
    for stack, layers in LAYERS.items():
        for i in range(layers):
            block = f"diffusion_model.{stack}.{i}"
            for third, name in enumerate(("to_q", "to_k", "to_v")):
                rows = (third * width, width)
                accepted[f"{block}.attention.{name}"] = (f"{block}.attention.qkv.weight", rows)
            accepted[f"{block}.attention.to_out.0"] = (f"{block}.attention.out.weight", None)
            for name in ("w1", "w2", "w3"):
                module = f"{block}.feed_forward.{name}"
                accepted[module] = (f"{module}.weight", None)
    return accepted


def test_comfyui_file_has_the_names_comfyui_maps(tmp_path):
    lora = random_lora(BLOCK)
    save_comfyui(tmp_path / "lora.safetensors", lora, SPEC, Z_IMAGE_MODULES)
    tensors = load_file(tmp_path / "lora.safetensors")
    parts = ("lora_A.weight", "lora_B.weight", "alpha")
    accepted = comfyui_targets()
    assert tensors.keys() == {f"{module}.{part}" for module in accepted for part in parts}
    assert len(tensors) == 4 * 7 * 3

    # Patching ComfyUI's own weights by its rule gives the fused qkv of the merged torch weights.
    fused = {}
    for module, (weight, rows) in accepted.items():
        a, b, alpha = (tensors[f"{module}.{part}"] for part in parts)
        assert alpha.shape == () and alpha.dtype == np.float32
        delta = float(alpha) / a.shape[0] * (b @ a)
        start, count = rows or (0, len(delta))
        fused.setdefault(weight, np.zeros((192 if rows else count, a.shape[1])))
        fused[weight][start:start + count] += delta
    flat = trees.flatten(lora)
    for i in range(2):
        expected = np.concatenate([
            (flat[f"layers/attention/{n}/a"][i] @ flat[f"layers/attention/{n}/b"][i]).T
            for n in ("to_q", "to_k", "to_v")
        ])
        got = fused[f"diffusion_model.layers.{i}.attention.qkv.weight"]
        np.testing.assert_allclose(got, expected * 7 / 3, atol=1e-6)


@pytest.mark.parametrize("rank,alpha", [(3, 7.0), (4, 8.0), (5, 0.1)])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("which", WHICH)
def test_what_is_written_is_read_back(tmp_path, form, which, rank, alpha):
    lora = {
        "published": random_lora(BLOCK, rank), "every_linear": every_linear(rank),
        "layers_only": random_lora(BLOCK, rank, {"layers": 2}),
    }[which]
    spec = LoraSpec(rank, alpha, "some/model")
    path = tmp_path / ("lora" if form == "peft" else "lora.safetensors")
    FORMATS[form](path, jax.tree.map(jnp.asarray, lora), spec, Z_IMAGE_MODULES)
    got, got_spec = read_lora(path, Z_IMAGE_MODULES, shapes_of(every_linear(rank)))
    assert got_spec == spec
    got, lora = trees.flatten(got), trees.flatten(lora)
    assert got.keys() == lora.keys()
    for name, want in lora.items():
        assert got[name].dtype == np.float32 and got[name].shape == want.shape
        if form == "diffusers" and alpha != 8.0 and name.endswith("/b"):  # 8 / 4 is exact
            np.testing.assert_array_max_ulp(got[name], want, 1)
        else:
            np.testing.assert_array_equal(got[name], want)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing temporary stays
    file = path / "adapter_model.safetensors" if form == "peft" else path
    assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444


@pytest.mark.parametrize("names", [
    dict(template="diffusion_model.{}", alpha=7),
    dict(template="{}", alpha=7),
    dict(template="diffusion_model.{}", down="lora_down", up="lora_up", alpha=7),
    dict(template="lora_unet_{}", down="lora_down", up="lora_up", alpha=7, kohya=True),
    dict(template="transformer.{}", metadata={"format": "pt", "lora_adapter_metadata": json.dumps(
        {"transformer.r": 3, "transformer.lora_alpha": 7, "transformer.rank_pattern": {}})}),
])
def test_names_of_other_tools_are_read(tmp_path, names):
    lora = every_linear()
    file = torch_file(tmp_path / "x.safetensors", lora, **names)
    got, spec = read_lora(file, Z_IMAGE_MODULES, shapes_of(lora))
    assert spec == LoraSpec(3, 7.0)
    jax.tree.map(np.testing.assert_array_equal, got, lora)


def test_without_any_alpha_the_scale_is_one(tmp_path):
    file = torch_file(tmp_path / "x.safetensors", random_lora(BLOCK), "transformer.{}")
    assert read_lora(file, Z_IMAGE_MODULES)[1] == LoraSpec(3, 3.0)
    assert read_lora(tmp_path, Z_IMAGE_MODULES)[1] == LoraSpec(3, 3.0)  # the only file there


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_become_float32(tmp_path, dtype):
    lora = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), random_lora(BLOCK))
    file = torch_file(tmp_path / "x.safetensors", lora, "transformer.{}", dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, read_lora(file, Z_IMAGE_MODULES)[0], lora)


def test_alphas_that_differ_are_folded_into_b(tmp_path):
    lora = random_lora(BLOCK)
    alphas = {"layers.1.attention.to_q": 6.0, "context_refiner.0.feed_forward.w2": 1.5}
    file = torch_file(
        tmp_path / "x.safetensors", lora, "diffusion_model.{}", alpha=lambda m: alphas.get(m, 3.0)
    )
    got, spec = read_lora(file, Z_IMAGE_MODULES)
    assert spec == LoraSpec(3, 3.0)
    lora["layers"]["attention"]["to_q"]["b"][1] *= 2
    lora["context_refiner"]["feed_forward"]["w2"]["b"] *= 0.5
    jax.tree.map(np.testing.assert_array_equal, got, lora)


def test_a_lora_of_some_layers_with_several_ranks_is_what_diffusers_makes_of_it(base, tmp_path):
    """As tools write that train or keep some layers, or cut each layer's ranks by its singular
    values; alphas of all kinds."""
    rng = np.random.default_rng(3)
    ranks = {"layers.1.attention.to_q": (5, 5.0), "layers.1.attention.to_k": (2, 6.0),
             "layers.0.feed_forward.w2": (3, 1.0), "context_refiner.0.attention.to_v": (1, 2.0)}
    tensors = {}
    for module, (rank, alpha) in ranks.items():
        out, size_in = base.get_submodule(module).weight.shape
        key = f"diffusion_model.{module}"
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((rank, size_in), np.float32) * 0.2
        tensors[f"{key}.lora_B.weight"] = rng.standard_normal((out, rank), np.float32)
        tensors[f"{key}.alpha"] = np.full((), alpha, np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    shapes = shapes_of(random_lora(BLOCK))
    lora, spec = read_lora(tmp_path / "x.safetensors", Z_IMAGE_MODULES, shapes)
    assert spec == LoraSpec(5, 5.0)
    assert lora["layers"]["attention"]["to_q"]["a"].shape == (2, 64, 5)
    pipe = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(), None, None, None, copy.deepcopy(base)
    )
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    assert_same_picture(run(pipe.transformer), base, lora, spec)
    # What is written of it is the same, zeros included.
    save_diffusers(tmp_path / "y.safetensors", lora, spec, Z_IMAGE_MODULES)
    again, _ = read_lora(tmp_path / "y.safetensors", Z_IMAGE_MODULES, shapes)
    jax.tree.map(np.testing.assert_array_equal, again, lora)


def test_published_output_directory_gives_its_student(tmp_path):
    student, teacher = random_lora(BLOCK, seed=1), random_lora(BLOCK, seed=2)
    save_peft(tmp_path / "student", student, SPEC, Z_IMAGE_MODULES)
    save_peft(tmp_path / "teacher", teacher, SPEC, Z_IMAGE_MODULES)
    got, spec = read_lora(tmp_path, Z_IMAGE_MODULES)
    assert spec == SPEC
    jax.tree.map(np.testing.assert_array_equal, got, student)


def test_names_are_those_of_every_linear_of_the_network(base):
    """Both directions: each torch Linear has one rule, each rule some torch Linear."""
    linears = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    rules_of = {n: [r for r in Z_IMAGE_MODULES if re.fullmatch(r.pattern, n)] for n in linears}
    assert {len(rules) for rules in rules_of.values()} == {1}
    used = {rules[0].target for rules in rules_of.values()}
    named = [r.target for r in Z_IMAGE_MODULES if r.target is not None]
    assert used == set(named) and len(named) == 29
