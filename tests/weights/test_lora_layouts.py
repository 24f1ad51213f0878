"""LoRA files of other tools: the makers' own layout with fused projections, and other names."""

import numpy as np
import pytest
from lora_examples import (
    BLOCK,
    LAYERS,
    SPEC,
    Z_IMAGE_MODULES,
    every_linear,
    random_lora,
    torch_sites,
)
from one_file_examples import assert_same
from safetensors.numpy import load_file, save_file

from dopsd_jax.core import trees
from dopsd_jax.models.flux2 import Flux2Config
from dopsd_jax.weights.flux2 import FLUX2
from dopsd_jax.weights.lora_files import (
    LoraFileError,
    LoraSpec,
    read_lora,
    save_comfyui_fused,
)

RANK, DIM = 3, 64
# Modules of a block as its makers call them -> tree paths of their rows, in order; in, out.
MAKERS = {
    "attention.qkv": (("to_q", "to_k", "to_v"), DIM, 3 * DIM),
    "attention.out": (("to_out",), DIM, DIM),
}
# Modules outside of the blocks that the makers call otherwise.
OTHER_NAMES = {
    "all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}


def fused_file(file, *, name="{module}", down="lora_A.weight", up="lora_B.weight", alpha=None):
    """A LoRA on the fused layout in every block, and what it adds to each kernel [in, out]."""
    rng, tensors, deltas = np.random.default_rng(0), {}, {}
    for stack, layers in LAYERS.items():
        for layer in range(layers):
            for module, (parts, size_in, size_out) in MAKERS.items():
                path = name.format(module=f"{stack}.{layer}.{module}")
                if name.startswith("lora_unet_"):
                    path = path.replace(".", "_")
                a = rng.standard_normal((RANK, size_in)).astype(np.float32)
                b = rng.standard_normal((size_out, RANK)).astype(np.float32)
                tensors[f"{path}.{down}"], tensors[f"{path}.{up}"] = a, b
                if alpha is not None:
                    tensors[f"{path}.alpha"] = np.array(alpha, np.float32)
                scale = 1 if alpha is None else alpha / RANK
                for part, rows in zip(parts, np.split(scale * (b @ a), len(parts)), strict=True):
                    deltas[f"{stack}/attention/{part}", layer] = rows.T
    save_file(tensors, file)
    return deltas


@pytest.mark.parametrize("how", [
    {}, {"name": "diffusion_model.{module}"}, {"name": "model.diffusion_model.{module}"},
    {"name": "lora_unet_{module}", "down": "lora_down.weight", "up": "lora_up.weight",
     "alpha": 6.0},
    {"name": "pipe.dit.{module}", "down": "lora_A.default.weight", "up": "lora_B.default.weight"},
    {"name": "transformer.{module}", "alpha": 1.0},
], ids=lambda how: how.get("name", "no prefix"))
def test_a_lora_on_fused_projections_adds_exactly_the_same(tmp_path, how):
    deltas = fused_file(tmp_path / "lora.safetensors", **how)
    tree, spec = read_lora(tmp_path / "lora.safetensors", Z_IMAGE_MODULES)
    flat = trees.flatten(tree)
    assert {n.rpartition("/")[0] for n in flat} == {path for path, _ in deltas}
    for (path, layer), delta in deltas.items():
        got = spec.scale * flat[f"{path}/a"][layer] @ flat[f"{path}/b"][layer]
        np.testing.assert_allclose(got, delta, atol=1e-5, err_msg=path)


def test_names_of_diffsynth_studio_are_read(tmp_path):
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(2):
        for part in ("to_q", "to_out.0"):
            for kind, shape in (("A", (RANK, DIM)), ("B", (DIM, RANK))):
                tensors[f"layers.{layer}.attention.{part}.lora_{kind}.default.weight"] = (
                    rng.standard_normal(shape).astype(np.float32)
                )
    found = []
    for prefix in ("", "pipe.dit."):
        file = tmp_path / f"{len(prefix)}.safetensors"
        save_file({prefix + name: x for name, x in tensors.items()}, file)
        tree, spec = read_lora(file, Z_IMAGE_MODULES)
        assert spec.scale == 1
        found.append(trees.flatten(tree))
    for name, x in found[0].items():
        np.testing.assert_array_equal(found[1][name], x)
    np.testing.assert_array_equal(
        found[0]["layers/attention/to_out/b"][1],
        tensors["layers.1.attention.to_out.0.lora_B.default.weight"].T,
    )


def test_the_makers_names_of_flux2_are_those_of_its_single_file():
    """Each projection's rows in order; what swaps its rows is left out."""
    makers = dict(FLUX2.modules(Flux2Config.klein_4b()).makers)
    block = "transformer_blocks.{layer}"
    assert makers["double_blocks.{layer}.img_attn.qkv"] == tuple(
        f"{block}.attn.to_{p}" for p in "qkv"
    )
    assert makers["double_blocks.{layer}.txt_attn.qkv"] == tuple(
        f"{block}.attn.add_{p}_proj" for p in "qkv"
    )
    assert makers["double_blocks.{layer}.txt_mlp.2"] == (f"{block}.ff_context.linear_out",)
    assert makers["single_blocks.{layer}.linear1"] == (
        "single_transformer_blocks.{layer}.attn.to_qkv_mlp_proj",
    )
    assert makers["img_in"] == ("x_embedder",)
    assert "final_layer.adaLN_modulation.1" not in makers


def test_kohya_files_of_flux2_are_read(tmp_path):
    config = Flux2Config.klein_4b()
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(config.num_layers):
        name = f"lora_unet_double_blocks_{layer}_img_attn_qkv"
        tensors[f"{name}.lora_down.weight"] = rng.standard_normal((2, 8)).astype(np.float32)
        tensors[f"{name}.lora_up.weight"] = rng.standard_normal((24, 2)).astype(np.float32)
        tensors[f"{name}.alpha"] = np.array(1, np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    tree, spec = read_lora(tmp_path / "lora.safetensors", FLUX2.modules(config))
    flat = trees.flatten(tree)
    up = tensors["lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight"]
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        b = flat[f"transformer_blocks/attn/{part}/b"][1]
        np.testing.assert_array_equal(b, up[8 * i : 8 * i + 8].T)
    assert spec.scale == 0.5


def test_rows_that_cannot_be_three_parts_are_refused(tmp_path):
    name = "layers.0.attention.qkv"
    save_file({f"{name}.lora_A.weight": np.zeros((2, DIM), np.float32),
               f"{name}.lora_B.weight": np.zeros((100, 2), np.float32)},
              tmp_path / "bad.safetensors")
    shapes = {"layers": {"attention": {
        p: {"kernel": np.zeros((1, DIM, DIM))} for p in ("to_q", "to_k", "to_v")
    }}}
    with pytest.raises(LoraFileError, match=r"and \(out, r\) = \(64, r\), got"):
        read_lora(tmp_path / "bad.safetensors", Z_IMAGE_MODULES, shapes)


@pytest.mark.parametrize("tensor, kind", [
    ("lora_unet_layers_0_attention_to_q.hada_w1_a", "LoHa (LyCORIS)"),
    ("layers.0.attention.to_q.oft_R.weight", "OFT"),
])
def test_other_kinds_of_adapters_are_named(tmp_path, tensor, kind):
    save_file({tensor: np.zeros((2, 2), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(LoraFileError) as caught:
        read_lora(tmp_path / "x.safetensors", Z_IMAGE_MODULES)
    assert f"this is {kind}, which is not read here" in str(caught.value)


@pytest.mark.parametrize("alpha", [7.0, 0.1])
def test_the_fused_format_adds_the_same_and_is_read_back_exactly(tmp_path, alpha):
    """q, k and v become one LoRA of three times the rank; other modules keep theirs."""
    lora, spec = every_linear(), LoraSpec(3, alpha, "some/model")
    save_comfyui_fused(tmp_path / "lora.safetensors", lora, spec, Z_IMAGE_MODULES)
    tensors = load_file(tmp_path / "lora.safetensors")
    modules = {n.rpartition(".lora_A")[0] for n in tensors if ".lora_A" in n}
    assert len(tensors) == 3 * len(modules)
    sites = torch_sites(lora)
    for name, module in OTHER_NAMES.items():
        sites[module] = sites.pop(name)
    for block in (f"{stack}.{i}" for stack, layers in LAYERS.items() for i in range(layers)):
        sites[f"{block}.attention.out"] = sites.pop(f"{block}.attention.to_out.0")
        sites[f"{block}.attention.qkv"] = [sites.pop(f"{block}.attention.to_{p}") for p in "qkv"]
    assert modules == {f"diffusion_model.{m}" for m in sites}
    for module, pairs in sites.items():
        key = f"diffusion_model.{module}"
        a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        pairs = pairs if isinstance(pairs, list) else [pairs]
        assert len(a) == 3 * len(pairs)
        want = np.concatenate([spec.scale * (x @ y).T for x, y in pairs])
        got = tensors[f"{key}.alpha"] / len(a) * (b @ a)
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=module)
    tree, read = read_lora(tmp_path / "lora.safetensors", Z_IMAGE_MODULES)
    assert read == spec
    assert_same(lora, tree)


def test_block_diagonals_of_other_tools_are_read_as_the_loras_they_were(tmp_path):
    """Kohya's names and no word of ours; a lora_B of zeros in one layer is one, too."""
    lora = every_linear()
    lora["layers"]["attention"]["to_k"]["b"][1] = 0
    save_comfyui_fused(tmp_path / "ours.safetensors", lora, SPEC, Z_IMAGE_MODULES)
    theirs = {}
    for name, x in load_file(tmp_path / "ours.safetensors").items():
        module, _, rest = name.removeprefix("diffusion_model.").partition(".lora_")
        module = module.removesuffix(".alpha").replace(".", "_")
        kind = {"": "alpha", "A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[rest]
        theirs[f"lora_unet_{module}.{kind}"] = x
    save_file(theirs, tmp_path / "theirs.safetensors")
    tree, spec = read_lora(tmp_path / "theirs.safetensors", Z_IMAGE_MODULES)
    assert (spec.rank, spec.alpha) == (SPEC.rank, SPEC.alpha)
    assert_same(lora, tree)


def test_fused_loras_that_are_no_blocks_or_all_zeros_keep_their_rank(tmp_path):
    fused_file(tmp_path / "lora.safetensors")
    assert read_lora(tmp_path / "lora.safetensors", Z_IMAGE_MODULES)[1].rank == RANK
    tensors = {n: x * ("lora_A" in n) for n, x in load_file(tmp_path / "lora.safetensors").items()}
    save_file(tensors, tmp_path / "zeros.safetensors")
    assert read_lora(tmp_path / "zeros.safetensors", Z_IMAGE_MODULES)[1].rank == RANK


def test_a_lora_on_v_alone_stays_one(tmp_path):
    lora = random_lora({"attention.to_v": BLOCK["attention.to_v"]})
    save_comfyui_fused(tmp_path / "lora.safetensors", lora, SPEC, Z_IMAGE_MODULES)
    assert load_file(tmp_path / "lora.safetensors")[
        "diffusion_model.layers.0.attention.qkv.lora_B.weight"
    ].shape == (3 * DIM, 3 * SPEC.rank)
    tree, spec = read_lora(tmp_path / "lora.safetensors", Z_IMAGE_MODULES)
    assert spec == SPEC
    assert_same(lora, tree)


@pytest.mark.parametrize("blocks", [True, False])
def test_each_part_of_a_fused_dora_has_its_own_lengths(tmp_path, blocks):
    """Of a block-diagonal one also a part that adds nothing."""
    file, sizes = tmp_path / "lora.safetensors", {}
    if blocks:
        lora = random_lora({"attention.to_v": BLOCK["attention.to_v"]})
        save_comfyui_fused(file, lora, SPEC, Z_IMAGE_MODULES)
    else:
        fused_file(file, name="diffusion_model.{module}")
    tensors, rng = load_file(file), np.random.default_rng(0)
    for module in [n.removesuffix(".lora_A.weight") for n in tensors if "lora_A" in n]:
        rows = len(tensors[f"{module}.lora_B.weight"])
        sizes[module] = tensors[f"{module}.dora_scale"] = rng.random((rows, 1), np.float32)
    save_file(tensors, file)
    tree, spec = read_lora(file, Z_IMAGE_MODULES)
    flat = trees.flatten(tree)
    for stack, layers in LAYERS.items():
        for layer in range(layers):
            parts = np.split(sizes[f"diffusion_model.{stack}.{layer}.attention.qkv"].ravel(), 3)
            for part, want in zip("qkv", parts, strict=True):
                path = f"{stack}/attention/to_{part}"
                np.testing.assert_array_equal(flat[f"{path}/m"][layer], want)
                assert flat[f"{path}/b"][layer].shape == (spec.rank, DIM)
                assert flat[f"{path}/b"][layer].any() == (part == "v" or not blocks)


def test_what_the_fused_format_cannot_hold_is_said(tmp_path):
    pair = {"a": np.ones((8, 3), "f4"), "b": np.ones((3, 16), "f4")}
    with pytest.raises(LoraFileError, match="norm_out.linear: has its rows in another order"):
        save_comfyui_fused(tmp_path / "x.safetensors", {"norm_out": pair}, SPEC,
                           FLUX2.modules(Flux2Config.klein_4b()))
    assert not (tmp_path / "x.safetensors").exists()
