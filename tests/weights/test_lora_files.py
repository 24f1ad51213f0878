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
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dopsd_jax.core import trees
from dopsd_jax.models.z_image import ZImageConfig
from dopsd_jax.weights.lora_files import (
    FORMATS,
    LoraFileError,
    LoraSpec,
    read_lora,
    save_comfyui,
    save_diffusers,
    save_peft,
)
from dopsd_jax.weights.z_image import Z_IMAGE

Z_IMAGE_MODULES = Z_IMAGE.modules(ZImageConfig())

TINY = dict(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=64, n_layers=2,
    n_refiner_layers=1, n_heads=4, n_kv_heads=4, norm_eps=1e-5, qk_norm=True, cap_feat_dim=32,
    rope_theta=256.0, t_scale=1000.0, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
)
LAYERS = {"layers": 2, "noise_refiner": 1, "context_refiner": 1}
# Linears of a block: torch name, tree path, (in, out). Written out, not taken from the code tested.
BLOCK = {
    "attention.to_q": ("attention/to_q", 64, 64),
    "attention.to_k": ("attention/to_k", 64, 64),
    "attention.to_v": ("attention/to_v", 64, 64),
    "attention.to_out.0": ("attention/to_out", 64, 64),
    "feed_forward.w1": ("feed_forward/w1", 64, 170),
    "feed_forward.w2": ("feed_forward/w2", 170, 64),
    "feed_forward.w3": ("feed_forward/w3", 64, 170),
}
REST = {
    "all_x_embedder.2-1": ("x_embedder", 16, 64),
    "all_final_layer.2-1.linear": ("final_linear", 64, 16),
    "all_final_layer.2-1.adaLN_modulation.1": ("final_modulation", 64, 64),
    "t_embedder.mlp.0": ("t_embedder/mlp_0", 256, 1024),
    "t_embedder.mlp.2": ("t_embedder/mlp_2", 1024, 64),
    "cap_embedder.1": ("cap_embedder", 32, 64),
}
SPEC = LoraSpec(rank=3, alpha=7.0, base_model="some/model")


def random_lora(where, rank=3, stacks=LAYERS, seed=0):
    """Random a and b on the Linears `where` = {torch name: (tree path, in, out)} of `stacks`."""
    rng = np.random.default_rng(seed)
    flat = {}
    for stack, layers in stacks.items():
        for path, size_in, size_out in where.values():
            flat[f"{stack}/{path}/a"] = rng.standard_normal((layers, size_in, rank), np.float32)
            flat[f"{stack}/{path}/b"] = rng.standard_normal((layers, rank, size_out), np.float32)
    return trees.unflatten({k: v * np.float32(0.2) for k, v in flat.items()})


def every_linear(rank=3):
    """A LoRA on all Linears of the network, those outside the stacks too."""
    rng = np.random.default_rng(1)
    flat = trees.flatten(random_lora(BLOCK, rank))
    sites = {path: ((), i, o) for path, i, o in REST.values()}
    sites |= {f"{s}/adaLN_modulation": ((LAYERS[s],), 64, 256) for s in ("layers", "noise_refiner")}
    for path, (stack, size_in, size_out) in sites.items():
        flat[f"{path}/a"] = 0.2 * rng.standard_normal((*stack, size_in, rank), np.float32)
        flat[f"{path}/b"] = 0.2 * rng.standard_normal((*stack, rank, size_out), np.float32)
    return trees.unflatten(flat)


def torch_sites(lora):
    """{torch module name: (a [in, r], b [r, out])}, by the lists above."""
    flat, sites = trees.flatten(lora), {}
    for stack, layers in LAYERS.items():
        block = {**BLOCK, "adaLN_modulation.0": ("adaLN_modulation",)}
        for module, (path, *_) in block.items():
            if f"{stack}/{path}/a" in flat:
                for i in range(layers):
                    sites[f"{stack}.{i}.{module}"] = tuple(
                        flat[f"{stack}/{path}/{leaf}"][i] for leaf in "ab"
                    )
    for module, (path, *_) in REST.items():
        if f"{path}/a" in flat:
            sites[module] = (flat[f"{path}/a"], flat[f"{path}/b"])
    return sites


def shapes_of(lora):
    """The params tree a LoRA fits: `kernel` where it has a and b."""
    flat = trees.flatten(lora)
    return trees.unflatten({
        name[:-1] + "kernel": jax.ShapeDtypeStruct(
            (*a.shape[:-1], flat[name[:-1] + "b"].shape[-1]), jnp.bfloat16
        )
        for name, a in flat.items() if name.endswith("/a")
    })


@pytest.fixture(scope="module")
def base():
    """A tiny torch transformer, every trivial tensor randomised."""
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(**TINY).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1 or "pad_token" in name:
            torch.nn.init.normal_(p, float("norm" in name), 0.3)
    return model


def run(model):
    """Output on two images of different size with captions of 5 and 37 tokens."""
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(4, 1, 12, 10, generator=g), torch.randn(4, 1, 8, 16, generator=g)]
    captions = [torch.randn(n, 32, generator=g) for n in (5, 37)]
    with torch.no_grad():
        out = model(x, torch.tensor([0.2, 0.7]), captions, return_dict=False)[0]
    return torch.cat([o.flatten() for o in out]).numpy()


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


def torch_file(path, lora, template, down="lora_A", up="lora_B", alpha=None, dtype=np.float32,
               metadata=None, kohya=False):
    """A LoRA file in somebody else's names; `alpha` is a number or a function of the module."""
    tensors = {}
    for module, (a, b) in torch_sites(lora).items():
        key = template.format(module.replace(".", "_") if kohya else module)
        tensors[f"{key}.{down}.weight"] = np.ascontiguousarray(a.T).astype(dtype)
        tensors[f"{key}.{up}.weight"] = np.ascontiguousarray(b.T).astype(dtype)
        if alpha is not None:
            value = alpha(module) if callable(alpha) else alpha
            tensors[f"{key}.alpha"] = np.full((), value, np.float32)
    save_file(tensors, path, metadata)
    return path


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


def test_published_output_directory_gives_its_student(tmp_path):
    student, teacher = random_lora(BLOCK, seed=1), random_lora(BLOCK, seed=2)
    save_peft(tmp_path / "student", student, SPEC, Z_IMAGE_MODULES)
    save_peft(tmp_path / "teacher", teacher, SPEC, Z_IMAGE_MODULES)
    got, spec = read_lora(tmp_path, Z_IMAGE_MODULES)
    assert spec == SPEC
    jax.tree.map(np.testing.assert_array_equal, got, student)


# Bad input


def fails(text, *args, f=read_lora):
    with pytest.raises(LoraFileError, match=text) as e:
        f(*args)
    return str(e.value)


@pytest.fixture
def tensors(tmp_path):
    """The tensors of a good diffusers file, and how to write and read a changed one."""
    save_diffusers(tmp_path / "good.safetensors", random_lora(BLOCK), SPEC, Z_IMAGE_MODULES)

    def read(tensors, shapes=None):
        save_file(tensors, tmp_path / "bad.safetensors")
        return read_lora(tmp_path / "bad.safetensors", Z_IMAGE_MODULES, shapes)

    return load_file(tmp_path / "good.safetensors"), read


A = "transformer.layers.1.attention.to_q.lora_A.weight"
B = "transformer.layers.1.attention.to_q.lora_B.weight"


def test_all_that_is_wrong_with_the_names_is_said_at_once(tensors):
    t, read = tensors
    t["transformer.layers.1.attention.qkv.lora_A.weight"] = t[A]
    t["transformer.layers.1.attention.to_q.dora_scale"] = np.zeros(3, np.float32)
    t["text_encoder.layers.1.lora_A.weight"] = t[A]
    del t[B], t["transformer.noise_refiner.0.feed_forward.w2.lora_A.weight"]
    text = fails(r"bad\.safetensors: 7 problems", t, f=read)
    for line in (
        "expected one prefix on all keys, got none, transformer.; split the file",
        "transformer.layers.1.attention.qkv.lora_A.weight: unknown key, belongs to no module",
        "transformer.layers.1.attention.to_q.dora_scale: unknown key",
        "text_encoder.layers.1.lora_A.weight: unknown key",
        f"{A}: lora_B of the same module is missing",
        "transformer.noise_refiner.0.feed_forward.w2.lora_B.weight: lora_A of the same module is",
        "layers/attention/to_q: expected all 2 layers, got 1, missing 1; a LoRA of some layers "
        "only is not read, add the missing ones with a lora_B of zeros",
    ):
        assert line in text


def test_differing_ranks_are_refused(tensors):
    t, read = tensors
    t[A], t[B] = np.zeros((5, 64), np.float32), np.zeros((64, 5), np.float32)
    fails(rf"expected one rank in all modules, got 3 in 27, first .*; 5 in 1, first {A}; resize",
          t, f=read)


@pytest.mark.parametrize("key,shape,text", [
    (A, (3, 32), r"to_q: expected one shape in all layers, got .*\(32,\)"),
    (A, (2, 64), r"to_q.lora_A.weight: expected \(r, in\) beside \(out, r\), got \(2, 64\) beside"),
    (A, (3, 64, 1, 1), r"expected \(r, in\) beside \(out, r\), got \(3, 64, 1, 1\) beside"),
    (A.replace("lora_A.weight", "alpha"), (2,), r"to_q.alpha: expected one number, got \(2,\)"),
])
def test_wrong_shapes_are_refused(tensors, key, shape, text):
    t, read = tensors
    t[key] = np.zeros(shape, np.float32)
    fails(text, t, f=read)


def test_shapes_and_layers_are_checked_against_the_network(tensors):
    t, read = tensors
    shapes = trees.flatten(shapes_of(random_lora(BLOCK)))
    shapes["layers/attention/to_q/kernel"] = jax.ShapeDtypeStruct((3, 96, 96), jnp.float32)
    shapes["layers/attention/to_k/kernel"] = jax.ShapeDtypeStruct((1, 64, 64), jnp.float32)
    del shapes["noise_refiner/feed_forward/w1/kernel"]
    text = fails("5 problems", t, trees.unflatten(shapes), f=read)
    for line in (
        f"{A}: expected (r, 96) and (out, r) = (96, r), got (3, 64) and (64, 3); is it of another",
        "layers/attention/to_q: expected all 3 layers, got 2, missing 2; a LoRA of some",
        "layers/attention/to_k: the network has 1 layers, the file one 1",
        "w1.lora_A.weight: the network has no parameter noise_refiner/feed_forward/w1/kernel",
    ):
        assert line in text


def test_absurd_layer_index_is_reported_not_allocated(tensors):
    t, read = tensors
    t = {k.replace("layers.1.", "layers.999999999999."): v for k, v in t.items()}
    fails("expected all 1000000000000 layers, got 2, missing 1, 2, 3, .* ..;", t, f=read)


def test_values_that_cannot_be_used_are_refused(tensors):
    t, read = tensors
    fails("expected floats .*, got I32", {**t, A: t[A].astype(np.int32)}, f=read)
    fails(f"{A}: holds NaN or infinity", {**t, A: t[A] * np.float32(np.nan)}, f=read)
    alpha = A.replace("lora_A.weight", "alpha")
    fails("alpha: expected a number but 0, got 0.0", {**t, alpha: np.zeros((), np.float32)}, f=read)


def test_files_that_are_no_lora_of_this_model_are_refused(tensors, base, tmp_path):
    t, read = tensors
    weights = {k: v.numpy() for k, v in base.state_dict().items()}
    fails(r"expected LoRA tensors .* found 73 others such as all_final.* this is no LoRA", weights,
          f=read)
    flux = {k.replace("layers", "transformer_blocks").replace("attention", "attn"): v
            for k, v in t.items() if ".layers." in k}
    fails(r"none of its 28 tensors belongs to this network: expected modules such as "
          r"layers\.0\.attention\.to_q, found .*; it was made for another model", flux, f=read)
    fails("no such file", tmp_path / "missing.safetensors", Z_IMAGE_MODULES)
    whole = (tmp_path / "good.safetensors").read_bytes()
    for size in (0, 5, 500, len(whole) - 1):
        (tmp_path / "bad.safetensors").write_bytes(whole[:size])
        fails("truncated or not a safetensors file", tmp_path / "bad.safetensors", Z_IMAGE_MODULES)


def test_pickles_are_refused(tmp_path):
    for suffix in (".bin", ".pt", ".ckpt"):
        torch.save({}, tmp_path / f"adapter_model{suffix}")
        fails("a pickled file can run code", tmp_path / f"adapter_model{suffix}", Z_IMAGE_MODULES)
    fails(r"found only pickled weights \(adapter_model.bin, .*\); these can run code", tmp_path,
          Z_IMAGE_MODULES)


def test_directories_without_one_clear_file_are_refused(tmp_path):
    fails("or a single .safetensors file, found none", tmp_path, Z_IMAGE_MODULES)
    for name in "ab":
        save_diffusers(tmp_path / f"{name}.safetensors", random_lora(BLOCK), SPEC, Z_IMAGE_MODULES)
    fails("found a.safetensors, b.safetensors; name the file itself", tmp_path, Z_IMAGE_MODULES)


def test_peft_config_must_be_there_and_mean_plain_lora(tmp_path):
    path = tmp_path / "lora"
    save_peft(path, random_lora(BLOCK), SPEC, Z_IMAGE_MODULES)
    config = json.loads((path / "adapter_config.json").read_text())

    def with_config(text, **changes):
        (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return fails(text, path, Z_IMAGE_MODULES)

    text = with_config("its LoRA config: 4 problems", use_rslora=True, r=8, lora_alpha=None,
                       alpha_pattern={"to_q": 1})
    for line in ("use_rslora: expected False, got True", "r: expected 3 as in the tensors, got 8",
                 "alpha_pattern: expected {}, got {'to_q': 1}; such a LoRA is not read here",
                 "lora_alpha: expected a number other than 0, got None"):
        assert line in text
    (path / "adapter_config.json").write_text("{")
    fails("adapter_config.json: not valid JSON", path, Z_IMAGE_MODULES)
    (path / "adapter_config.json").unlink()
    fails("adapter_config.json: no such file; a PEFT adapter keeps its alpha there", path,
          Z_IMAGE_MODULES)


@pytest.mark.parametrize("changes,text", [
    ({"lora_alpha": True}, "lora_alpha: expected a number other than 0, got True"),
    ({"r": 3.0}, "r: expected 3 as in the tensors, got 3.0"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path: expected a text, got 3"),
])
def test_wrong_types_in_a_peft_config_are_refused(tmp_path, changes, text):
    save_peft(tmp_path / "lora", random_lora(BLOCK), SPEC, Z_IMAGE_MODULES)
    file = tmp_path / "lora/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert "adapter_model.safetensors" in fails(text, tmp_path / "lora", Z_IMAGE_MODULES)


@pytest.mark.parametrize("ours,text", [
    ({"scale_in_b": True}, "rank: missing; expected a whole number of at least 1; alpha: missing"),
    ({"rank": 3, "alpha": 7.0, "scale_in_b": True}, "base_model: missing; expected a text"),
    ({"rank": 3, "alpha": "x", "base_model": ""}, "alpha: expected a number other than 0, got 'x'"),
    ({"rank": 3, "alpha": 7.0, "base_model": 3}, "base_model: expected a text, got 3"),
    ({"rank": 3, "alpha": 7.0, "base_model": "", "scale_in_b": 1}, "expected true or false, got 1"),
])
def test_damaged_metadata_of_our_own_is_refused(tmp_path, ours, text):
    file = torch_file(tmp_path / "x.safetensors", random_lora(BLOCK), "transformer.{}",
                      metadata={"dopsd_jax_lora": json.dumps(ours)})
    assert "x.safetensors, dopsd_jax_lora: " in fails(text, file, Z_IMAGE_MODULES)


def test_alpha_in_two_places_is_refused(tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 3})}
    file = torch_file(tmp_path / "x.safetensors", random_lora(BLOCK), "transformer.{}", alpha=7,
                      metadata=metadata)
    fails("expected alpha in the config or in .alpha tensors, got both", file, Z_IMAGE_MODULES)


@pytest.mark.parametrize("form", FORMATS)
def test_trees_that_no_file_can_hold_are_refused(tmp_path, form):
    flat = trees.flatten(random_lora(BLOCK))
    flat["layers/attention/norm_q/a"] = flat["layers/attention/to_q/a"]
    del flat["layers/attention/to_k/b"]
    flat["layers/attention/to_v/a"] = flat["layers/attention/to_v/a"][..., :2]
    flat["layers/feed_forward/w1/b"] = flat["layers/feed_forward/w1/b"] * np.nan
    for leaf in "ab":
        flat[f"layers/feed_forward/w2/{leaf}"] = flat[f"layers/feed_forward/w2/{leaf}"][:1]
    path = tmp_path / ("lora" if form == "peft" else "lora.safetensors")
    text = fails("5 problems", path, trees.unflatten(flat), SPEC, Z_IMAGE_MODULES, f=FORMATS[form])
    for line in (
        "layers/attention/norm_q/a: no a or b of a module this network's LoRA files can name",
        "layers/attention/to_k: expected a and b, got only a",
        "layers/attention/to_v: expected a [layers, in, 3] and b [layers, 3, out], got (2, 64, 2) "
        "and (2, 3, 64)",
        "layers/feed_forward/w1: holds NaN or infinity",
        "layers.: expected one number of layers, got [1, 2]",
    ):
        assert line in text
    fails("the LoRA is empty", path, {}, SPEC, Z_IMAGE_MODULES, f=FORMATS[form])
    assert list(tmp_path.iterdir()) == []


def test_impossible_specs_are_refused():
    fails("expected a LoRA rank of at least 1 and a finite alpha other than 0, got rank 0, alpha 1",
          0, 1.0, f=LoraSpec)
    fails("got rank 4, alpha nan", 4, float("nan"), f=LoraSpec)


def test_peft_replaces_an_adapter_but_no_other_directory(tmp_path):
    path, lora = tmp_path / "lora", random_lora(BLOCK)
    path.mkdir()
    save_peft(path, random_lora(BLOCK, seed=5), SPEC, Z_IMAGE_MODULES)
    save_peft(path, lora, LoraSpec(3, 1.0), Z_IMAGE_MODULES)
    got, spec = read_lora(path, Z_IMAGE_MODULES)
    assert spec == LoraSpec(3, 1.0)
    jax.tree.map(np.testing.assert_array_equal, got, lora)
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]

    (path / "notes.txt").write_text("mine")
    fails("expected a new or empty directory or an earlier PEFT adapter, found a directory with "
          "notes.txt; choose another name", path, lora, SPEC, Z_IMAGE_MODULES, f=save_peft)
    (tmp_path / "file").write_text("mine")
    fails("found a file", tmp_path / "file", lora, SPEC, Z_IMAGE_MODULES, f=save_peft)
    fails("expected the name of a directory", tmp_path / "x.safetensors", lora, SPEC,
          Z_IMAGE_MODULES, f=save_peft)
    fails(r"expected the name of a file that ends in \.safetensors", tmp_path / "x.ckpt", lora,
          SPEC, Z_IMAGE_MODULES, f=save_comfyui)
    assert (path / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("form", FORMATS)
def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, form, monkeypatch):
    path = tmp_path / ("lora" if form == "peft" else "lora.safetensors")
    lora = random_lora(BLOCK)
    FORMATS[form](path, lora, SPEC, Z_IMAGE_MODULES)

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("dopsd_jax.weights.lora_files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        FORMATS[form](path, random_lora(BLOCK, seed=9), SPEC, Z_IMAGE_MODULES)
    got = read_lora(path, Z_IMAGE_MODULES)[0]
    if form != "diffusers":
        jax.tree.map(np.testing.assert_array_equal, got, lora)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_names_are_those_of_every_linear_of_the_network(base):
    """Both directions: each torch Linear has one rule, each rule some torch Linear."""
    linears = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    rules_of = {n: [r for r in Z_IMAGE_MODULES if re.fullmatch(r.pattern, n)] for n in linears}
    assert {len(rules) for rules in rules_of.values()} == {1}
    used = {rules[0].target for rules in rules_of.values()}
    named = [r.target for r in Z_IMAGE_MODULES if r.target is not None]
    assert used == set(named) and len(named) == 29
