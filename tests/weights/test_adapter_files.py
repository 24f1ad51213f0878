"""DoRA and LoKr files: those of PEFT and lycoris are read, ours are read by them and by diffusers.

What a file means is computed here by hand in float64, from the formulas that PEFT and LyCORIS give.
"""

import copy
import json

import jax
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, ZImagePipeline
from lora_examples import BLOCK, LAYERS, Z_IMAGE_MODULES, run, tiny_model
from lycoris import create_lycoris_from_weights
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from test_lora_files_flux2 import FLUX2_MODULES, SITES
from test_lora_files_flux2 import LAYERS as FLUX2_LAYERS
from test_lora_files_flux2 import base as flux2_model  # noqa: F401 (a fixture)
from test_lora_files_flux2 import run as run_flux2

from dopsd_jax.core import trees
from dopsd_jax.method import lokr
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.models import adapters
from dopsd_jax.weights.lora_files import (
    FORMATS,
    LoraFileError,
    LoraSpec,
    read_lora,
    save_comfyui,
    save_diffusers,
    save_peft,
)

SPEC = LoraSpec(rank=3, alpha=7.0, base_model="some/model")
KINDS = ("dora", "lokr")
REFUSED = {
    ("dora", "comfyui"): "a DoRA has no ComfyUI file: .*write peft or diffusers",
    ("dora", "comfyui_fused"): "a DoRA has no ComfyUI file: .*write peft or diffusers",
    ("lokr", "comfyui_fused"): "a LoKr has no file on the fused layout: .*use the format comfyui",
}


class Case:
    """A family's torch model, how it is run and loaded, and where its linears lie in our tree."""

    def __init__(self, model, run, pipeline, modules, blocks, layers, factor):
        self.model, self.run, self.pipeline, self.modules = model, run, pipeline, modules
        self.factor = factor
        self.where = {
            f"{stack}.{i}.{module}": (f"{stack}/{path}", i)
            for stack in blocks for module, path in blocks[stack].items()
            for i in range(layers[stack])
        }

    def weight(self, module):
        return self.model.get_submodule(module).weight.detach().double().numpy()

    def params(self):
        stacks = {}
        for module, (path, _) in self.where.items():
            stacks.setdefault(f"{path}/kernel", []).append(self.weight(module).T)
        return trees.unflatten({n: np.stack(x).astype(np.float32) for n, x in stacks.items()})

    def tree(self, kind):
        """A random adapter of all these linears."""
        params, rng = self.params(), np.random.default_rng(0)
        names = sorted(trees.flatten(params))
        if kind == "lokr":
            made = lokr.init(jax.random.key(0), params, names, SPEC.rank, self.factor)
        else:
            made = lora_lib.init(jax.random.key(0), params, names, SPEC.rank)
        flat = {n: 0.2 * rng.standard_normal(x.shape, np.float32)
                for n, x in trees.flatten(made).items()}
        for name, kernel in trees.flatten(params).items() if kind == "dora" else ():
            length = np.linalg.norm(kernel, axis=-2)
            spread = 1 + 0.3 * rng.standard_normal(length.shape)
            flat[name.replace("kernel", "m")] = (length * spread).astype(np.float32)
        return trees.unflatten(flat)

    def tuned(self, tree, scale=SPEC.scale):
        """A copy of the model with the tree in its weights, by hand."""
        model, found = copy.deepcopy(self.model), adapters.sites(tree)
        for module, (path, i) in self.where.items():
            leaves = {n: x[i].astype(np.float64).T for n, x in found[path].items()}
            weight = tuned_weight(self.weight(module), leaves, scale)
            model.get_submodule(module).weight.data = torch.from_numpy(weight).float()
        return model

    def assert_same_picture(self, model, tree):
        got, want, before = (self.run(m) for m in (model, self.tuned(tree), self.model))
        assert np.abs(got - want).max() / np.abs(want).max() < 1e-5
        assert np.abs(got - before).max() / np.abs(before).max() > 0.05

    def load(self, file):
        """The model of a diffusers pipeline that has loaded a file."""
        model = copy.deepcopy(self.model)
        parts = [FlowMatchEulerDiscreteScheduler(), None, None, None, model]
        pipe = self.pipeline(*parts)
        pipe.load_lora_weights(file)
        return pipe.transformer


def tuned_weight(weight, leaves, scale):
    """W' (out, in) of torch-oriented leaves."""
    if "w1" in leaves:
        if "w2" in leaves:
            return weight + np.kron(leaves["w1"], leaves["w2"])
        return weight + scale * np.kron(leaves["w1"], leaves["w2_up"] @ leaves["w2_down"])
    moved = weight + scale * leaves["b"] @ leaves["a"]
    return leaves["m"][:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def z_image():
    blocks = {stack: {m: path for m, (path, *_) in BLOCK.items()} for stack in LAYERS}
    return Case(tiny_model(), run, ZImagePipeline, Z_IMAGE_MODULES, blocks, LAYERS, factor=8)


@pytest.fixture(scope="module")
def flux2(flux2_model):  # noqa: F811
    return Case(flux2_model, run_flux2, Flux2KleinPipeline, FLUX2_MODULES, SITES["all"],
                FLUX2_LAYERS, factor=6)


@pytest.fixture(params=["z_image", "flux2"])
def case(request):
    return request.getfixturevalue(request.param)


def assert_same(got, want, ulp=0):
    got, want = trees.flatten(got), trees.flatten(want)
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_max_ulp(got[name], x, ulp)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_written(case, tmp_path, kind, recwarn):
    tree = case.tree(kind)
    save_peft(tmp_path / "x", tree, SPEC, case.modules)
    model = PeftModel.from_pretrained(copy.deepcopy(case.model), tmp_path / "x")
    assert not [w for w in recwarn if "adapter" in str(w.message)]  # missing or unexpected keys
    case.assert_same_picture(model.base_model.model, tree)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_what_is_written(case, tmp_path, kind):
    tree = case.tree(kind)
    save_diffusers(tmp_path / "x.safetensors", tree, SPEC, case.modules)
    case.assert_same_picture(case.load(tmp_path / "x.safetensors"), tree)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back(case, tmp_path, kind, form):
    tree = case.tree(kind)
    path = tmp_path / ("x" if form == "peft" else "x.safetensors")
    if refusal := REFUSED.get((kind, form)):
        with pytest.raises(LoraFileError, match=refusal):
            FORMATS[form](path, tree, SPEC, case.modules)
        assert not path.exists()
        return
    FORMATS[form](path, tree, SPEC, case.modules)
    got, spec = read_lora(path, case.modules, case.params())
    assert spec == SPEC
    # What has alpha / rank in it is off by the rounding of that.
    assert_same(got, tree, ulp=1 if form == "diffusers" or kind == "lokr" != form else 0)


def test_lycoris_loads_the_lokr_for_comfyui(z_image, tmp_path):
    tree = z_image.tree("lokr")
    save_comfyui(tmp_path / "x.safetensors", tree, SPEC, Z_IMAGE_MODULES)
    tensors = {}
    for name, x in load_file(tmp_path / "x.safetensors").items():
        module, _, part = name.removeprefix("diffusion_model.").rpartition(".")
        tensors[f"lycoris_{module.replace('.', '_')}.{part}"] = torch.from_numpy(x)
    model = copy.deepcopy(z_image.model)
    with torch.no_grad():
        network, _ = create_lycoris_from_weights(1.0, "", model, weights_sd=tensors)
    assert len(network.loras) == len(z_image.where)
    network.apply_to()
    z_image.assert_same_picture(model, tree)


def peft_directory(z_image, folder, config):
    """A directory as PEFT writes it, its tensors random, and the model merged by PEFT."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(z_image.model), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "lokr_" in name:
                p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.mark.parametrize("config", [
    LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=list(BLOCK)),
    LoKrConfig(r=3, alpha=7, decompose_factor=8, target_modules=list(BLOCK)),
    LoKrConfig(r=3, alpha=7, decompose_factor=8, decompose_both=True, target_modules=list(BLOCK)),
    LoKrConfig(r=60, alpha=70, target_modules=list(BLOCK)),  # whole, which PEFT scales too
], ids=["dora", "lokr", "lokr, both products", "lokr, both whole"])
def test_what_peft_writes_is_read(z_image, tmp_path, config):
    merged = peft_directory(z_image, tmp_path, config)
    tree, spec = read_lora(tmp_path, Z_IMAGE_MODULES, z_image.params())
    got = lora_lib.merge(z_image.params(), tree, spec.scale)
    assert_kernels(z_image, got, merged)


def assert_kernels(z_image, params, model):
    flat = trees.flatten(params)
    for module, (path, i) in z_image.where.items():
        want = model.get_submodule(module).weight.detach().numpy().T
        np.testing.assert_allclose(flat[f"{path}/kernel"][i], want, rtol=1e-4, atol=2e-6)
        assert np.abs(z_image.weight(module).T - want).max() > 0.01


@pytest.mark.parametrize("which, make", {
    "lokr": lambda n, m: LokrModule(n, m, lora_dim=3, alpha=7, factor=4),
    "lokr, both products": lambda n, m: LokrModule(n, m, lora_dim=2, alpha=7, factor=8,
                                                   decompose_both=True),
    "lokr, second whole": lambda n, m: LokrModule(n, m, lora_dim=60, alpha=7, factor=-1),
    "dora": lambda n, m: LoConModule(n, m, lora_dim=3, alpha=7, weight_decompose=True),
}.items())
def test_what_lycoris_writes_is_read(z_image, tmp_path, which, make):
    torch.manual_seed(0)
    model, tensors = copy.deepcopy(z_image.model), {}
    with torch.no_grad():
        for module in z_image.where:
            linear = model.get_submodule(module)
            name = f"lycoris_{module.replace('.', '_')}"
            adapter = make(name, linear)
            for key, p in adapter.named_parameters():
                p.mul_(1.3) if "dora" in key else p.normal_(0, 0.2)
            # dora_scale is no parameter in this version of lycoris, but stands in its files.
            tensors |= {f"{name}.{k}": v.clone() for k, v in adapter.custom_state_dict().items()}
            # Its forward pass: merging would multiply a LoKr by alpha / rank twice.
            adapter.apply_to()
            linear.weight.data = linear.forward(torch.eye(linear.in_features)).T - (
                0 if linear.bias is None else linear.bias[:, None]
            )
            adapter.restore()
    save_torch_file({n: x.contiguous() for n, x in tensors.items()}, tmp_path / "x.safetensors")
    tree, spec = read_lora(tmp_path / "x.safetensors", Z_IMAGE_MODULES, z_image.params())
    assert adapters.kind_of(tree) == which[:4]
    assert_kernels(z_image, lora_lib.merge(z_image.params(), tree, spec.scale), model)


@pytest.mark.parametrize("factor", [3, 4, 8, -1])
def test_a_lokr_on_fused_projections_adds_exactly_the_same(z_image, tmp_path, factor):
    """192 rows of q, k and v: a first factor with 3 or 12 rows is cut, with 4 or 8 both are."""
    rng, tensors, deltas = np.random.default_rng(0), {}, {}
    (out_1, out_2), (in_1, in_2) = (lokr.factorization(n, factor) for n in (192, 64))
    for stack, layers in LAYERS.items():
        for layer in range(layers):
            module = f"diffusion_model.{stack}.{layer}.attention.qkv"
            shapes = {"lokr_w1": (out_1, in_1), "lokr_w2_a": (out_2, 2), "lokr_w2_b": (2, in_2)}
            new = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
            tensors |= {f"{module}.{n}": x for n, x in new.items()}
            tensors[f"{module}.alpha"] = np.array(3, np.float32)
            whole = 1.5 * np.kron(new["lokr_w1"], new["lokr_w2_a"] @ new["lokr_w2_b"])
            for part, rows in zip("qkv", np.split(whole, 3), strict=True):
                deltas[f"{stack}/attention/to_{part}", layer] = rows.T
    save_file(tensors, tmp_path / "x.safetensors")
    tree, spec = read_lora(tmp_path / "x.safetensors", Z_IMAGE_MODULES, z_image.params())
    found = adapters.sites(lora_lib.scaled(tree, spec.scale))
    assert spec == LoraSpec(2, 3.0) and found.keys() == {path for path, _ in deltas}
    assert {len(adapters.lokrs(leaves)) for leaves in found.values()} == {
        3 if factor in (4, 8) else 1
    }
    x = rng.standard_normal((5, 64)).astype(np.float32)
    for (path, layer), delta in deltas.items():
        leaves = {n: leaf[layer] for n, leaf in found[path].items()}
        assert adapters.problem(leaves, delta) == ""
        np.testing.assert_allclose(adapters.delta(leaves, delta), delta, atol=1e-5)
        got = adapters.adapted(x, np.zeros((5, 64), np.float32), leaves)
        np.testing.assert_allclose(got, x @ delta, atol=1e-4)


def test_diffusers_draws_the_same_with_a_lokr_on_fused_projections(flux2, tmp_path):
    """It fuses the model's projections for such a file, where here the rows are taken apart."""
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(FLUX2_LAYERS["transformer_blocks"]):
        for stream in ("img_attn", "txt_attn"):
            module = f"diffusion_model.double_blocks.{layer}.{stream}.qkv"
            shapes = {"lokr_w1": (4, 4), "lokr_w2_a": (36, 2), "lokr_w2_b": (2, 12)}
            tensors |= {f"{module}.{n}": 0.3 * rng.standard_normal(s, np.float32)
                        for n, s in shapes.items()}
            tensors[f"{module}.alpha"] = np.array(3, np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    tree, spec = read_lora(tmp_path / "x.safetensors", FLUX2_MODULES, flux2.params())
    params, model = trees.flatten(flux2.params()), copy.deepcopy(flux2.model)
    params |= trees.flatten(lora_lib.merge(trees.unflatten(params), tree, spec.scale))
    for module, (path, i) in flux2.where.items():
        weight = np.array(params[f"{path}/kernel"][i].T)
        model.get_submodule(module).weight.data = torch.from_numpy(weight)
    got, want, before = (
        run_flux2(m) for m in (model, flux2.load(tmp_path / "x.safetensors"), flux2.model)
    )
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-5
    assert np.abs(got - before).max() / np.abs(before).max() > 0.05


def test_a_dora_on_fused_projections_has_the_rows_of_its_parts(tmp_path):
    rng, module = np.random.default_rng(0), "lora_unet_layers_0_attention_qkv"
    tensors = {f"{module}.lora_down.weight": rng.standard_normal((2, 64)),
               f"{module}.lora_up.weight": rng.standard_normal((192, 2)),
               f"{module}.dora_scale": rng.uniform(1, 2, (192, 1))}
    tensors = {n: x.astype(np.float32) for n, x in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    tree, _ = read_lora(tmp_path / "x.safetensors", Z_IMAGE_MODULES)
    for i, part in enumerate("qkv"):
        leaves = tree["layers"]["attention"][f"to_{part}"]
        rows = slice(64 * i, 64 * i + 64)
        np.testing.assert_array_equal(leaves["m"][0], tensors[f"{module}.dora_scale"][rows, 0])
        np.testing.assert_array_equal(leaves["b"][0].T, tensors[f"{module}.lora_up.weight"][rows])


NAME = "transformer.layers.0.attention.to_q"
LOW = {f"{NAME}.lora_A.weight": (2, 64), f"{NAME}.lora_B.weight": (64, 2)}
KRON = {f"{NAME}.lokr_w1": (8, 8), f"{NAME}.lokr_w2": (8, 8)}


@pytest.mark.parametrize("shapes, text", [
    (LOW | {f"{NAME}.dora_scale": (1, 64)},
     r"expected a length for every output, \(64,\) or \(64, 1\), got \(1, 64\); lengths of inputs"),
    (KRON | {f"{NAME}.dora_scale": (64, 1)}, "a LoKr with a DoRA's lengths .* is not read here"),
    (KRON | {f"{NAME}.lokr_t2": (2, 2, 1, 1)}, "lokr_t2: unknown key, of LoKr of convolutions"),
    ({**KRON, f"{NAME}.lokr_w2": (8, 8, 1, 1)}, "expected matrices .* a LoKr of convolutions is"),
    ({f"{NAME}.lokr_w1": (8, 8), f"{NAME}.lokr_w2_a": (8, 2)}, "lokr_w2_b of the same module is m"),
    (LOW | KRON, "LoRA and LoKr of the same module; split the file"),
    (LOW | {n.replace("to_q", "to_k"): s for n, s in KRON.items()},
     "expected one kind of adapter in all modules, got LoRA and LoKr"),
    ({**KRON, f"{NAME}.lokr_w2": (8, 4)},
     r"expected factors of \(64, 64\), got those of \(64, 32\); is it of another model size"),
    (KRON | {n.replace(".0.", ".1."): s[::-1] for n, s in
             {f"{NAME}.lokr_w1": (4, 4), f"{NAME}.lokr_w2": (16, 16)}.items()},
     "layers/attention/to_q: expected the same factors in all layers"),
])
def test_files_that_are_not_read_are_refused_with_the_reason(z_image, tmp_path, shapes, text):
    save_file({n: np.ones(s, np.float32) for n, s in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(LoraFileError, match=text):
        read_lora(tmp_path / "x.safetensors", Z_IMAGE_MODULES, z_image.params())


def test_a_peft_config_must_say_that_it_is_a_dora(z_image, tmp_path):
    save_peft(tmp_path / "x", z_image.tree("dora"), SPEC, Z_IMAGE_MODULES)
    file = tmp_path / "x/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": False}))
    with pytest.raises(LoraFileError, match="use_dora: expected True, got False"):
        read_lora(tmp_path / "x", Z_IMAGE_MODULES)


def test_factors_that_peft_cannot_derive_have_a_comfyui_file_alone(z_image, tmp_path):
    leaves = {"w1": np.ones((2, 4, 16), np.float32), "w2": np.ones((2, 16, 4), np.float32)}
    tree = {"layers": {"attention": {"to_q": leaves}}}
    for save, name in ((save_peft, "x"), (save_diffusers, "x.safetensors")):
        with pytest.raises(LoraFileError, match="this LoKr's follow from none; write comfyui"):
            save(tmp_path / name, tree, SPEC, Z_IMAGE_MODULES)
    save_comfyui(tmp_path / "x.safetensors", tree, SPEC, Z_IMAGE_MODULES)
    assert_same(read_lora(tmp_path / "x.safetensors", Z_IMAGE_MODULES)[0], tree)
