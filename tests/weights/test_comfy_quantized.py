"""Float8, int8 and nvfp4 with scales: what they stand for, by torch and comfy-kitchen."""

import json

import comfy_kitchen
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from comfy_kitchen.tensor import TensorWiseINT8Layout
from one_file_examples import assert_same
from safetensors.numpy import save_file

from dopsd_jax.core import trees
from dopsd_jax.weights import WeightsError, load_pipeline, load_vision_language
from dopsd_jax.weights.load import load_tree, open_tensors
from dopsd_jax.weights.names import LINEAR, rule
from dopsd_jax.weights.pipeline import load_transformer

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


def to_float8(x, kind):
    """As torch rounds it: (the tensor as safetensors has it, its values in float32)."""
    small = torch.from_numpy(x).to(getattr(torch, kind))
    stored = small.view(torch.uint8).numpy().view(getattr(ml_dtypes, kind))
    return stored, small.float().numpy()


def quantised(tensors, kind, scales, *, per_row=False, prefix="", marker=None, entries=False):
    """A file of ComfyUI's whose matrices are float8 with scales, and what it stands for."""
    file, meant = {}, {}
    for name, x in tensors.items():
        file[prefix + name], meant[name] = x, x
        if not name.endswith(".weight") or x.ndim != 2:
            continue
        scale = np.abs(x).max(1 if per_row else (0, 1), keepdims=per_row) / np.float32(400)
        file[prefix + name], values = to_float8(x / scale, kind)
        meant[name] = values * scale
        layer = prefix + name.removesuffix(".weight")
        file |= dict(zip((f"{layer}.{s}" for s in scales), (np.asarray(scale), np.ones((), "f4")),
                         strict=False))
        if entries:
            entry = json.dumps({"format": kind, "full_precision_matrix_mult": True})
            file[f"{layer}.comfy_quant"] = np.frombuffer(entry.encode(), np.uint8)
    return file | ({} if marker is None else {f"{prefix}scaled_fp8": marker}), meant


SCALED = {
    "a marker": dict(kind=E4M3, scales=("scale_weight", "scale_input"),
                     prefix="model.diffusion_model.", marker=np.zeros(2, ml_dtypes.float8_e4m3fn)),
    "entries": dict(kind=E4M3, scales=("weight_scale", "input_scale"), entries=True),
    "scales alone": dict(kind=E5M2, scales=("weight_scale",)),
    "a scale per row": dict(kind=E4M3, scales=("weight_scale",), per_row=True, entries=True),
}


@pytest.mark.parametrize("name, how", [
    ("z_image", "a marker"), ("flux2", "entries"), ("z_image", "scales alone"),
    ("flux2", "a scale per row"),
])
def test_scaled_float8_is_what_it_stands_for(name, how, request, tmp_path):
    """In fused tensors and swapped ones too, in float32 and in bfloat16."""
    model, files = request.getfixturevalue(name), {}
    for kind, tensors in zip(
        ("float8", "float32"), quantised(model.parts["transformer"], **SCALED[how]), strict=True
    ):
        files[kind] = tmp_path / f"{kind}.safetensors"
        save_file(tensors, files[kind])

    def load(kind, dtype):
        return load_pipeline(model.small, dtype=dtype, parts=("transformer",),
                             transformer_file=files[kind])

    assert_same(load("float32", "float32").params, load("float8", "float32").params)
    want, got = load("float32", "bfloat16"), load("float8", "bfloat16")
    assert_same(want.params, got.params)
    kept = trees.flatten(load_transformer(got))  # where no dtype is asked for
    for path, x in trees.flatten(got.params).items():
        if path.endswith("kernel"):
            assert kept[path].dtype == jnp.bfloat16
            np.testing.assert_array_equal(kept[path], x, err_msg=path)


def test_a_text_encoder_of_float8_stands_for_a_language_model(z_image, tiny, tmp_path):
    tensors = {n.removeprefix("model."): x for n, x in z_image.parts["text_encoder"].items()}
    file, meant = quantised(tensors, **SCALED["entries"])
    head = {"lm_head.weight": file["embed_tokens.weight"],
            "lm_head.weight_scale": file["embed_tokens.weight_scale"]}
    save_file(file | head, tmp_path / "float8.safetensors")
    save_file(meant, tmp_path / "float32.safetensors")
    got, want = (
        load_pipeline(z_image.small, dtype="float32", parts=("text_encoder",),
                      text_encoder_file=tmp_path / f"{kind}.safetensors")
        for kind in ("float8", "float32")
    )
    assert_same(want.text_params, got.text_params)
    assert load_vision_language(tiny.vlm, got).matched == len(tensors)


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_plain_float8_is_widened(kind, tmp_path):
    """All 256 values, of a weight and of what is no weight, as a plain cast of a file makes it."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16).view(getattr(ml_dtypes, kind))
    save_file({"a.weight": values, "pad": values[0]}, tmp_path / "x.safetensors")
    want = torch.from_numpy(values.view(np.uint8)).view(getattr(torch, kind)).float().numpy()
    table = [rule("a.weight", "a/kernel", LINEAR), rule("pad", "pad")]
    shapes = {"a": {"kernel": jnp.zeros((16, 16))}, "pad": jnp.zeros(16)}
    for dtype in ("float32", "bfloat16", None):
        got = load_tree([tmp_path / "x.safetensors"], table, shapes, dtype=dtype)
        assert got["pad"].dtype == jnp.dtype(dtype or "bfloat16")
        np.testing.assert_array_equal(np.asarray(got["a"]["kernel"], np.float32), want.T)
        np.testing.assert_array_equal(np.asarray(got["pad"], np.float32), want[0])


def values_of(tmp_path, tensors, metadata=None):
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    return open_tensors([tmp_path / "x.safetensors"])


def nvfp4(rows, columns):
    """A matrix as comfy-kitchen quantises it: (tensors of the file, values by its own decoder)."""
    torch.manual_seed(rows)
    with comfy_kitchen.use_backend("eager"):
        x = torch.randn(rows, columns)
        scale = x.abs().max() / (6 * 448)
        packed, blocks = comfy_kitchen.quantize_nvfp4(x, scale)
        want = comfy_kitchen.dequantize_nvfp4(packed, scale, blocks, torch.float32)
    assert (want - x).abs().max() < 0.8 and want.abs().max() > 2
    return {
        "l.weight": packed.numpy(), "l.weight_scale_2": scale.numpy(),
        "l.weight_scale": blocks.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn),
    }, want.numpy()


@pytest.mark.parametrize("rows, columns", [(128, 64), (48, 96), (300, 144)])
def test_nvfp4_is_what_comfy_kitchen_makes_of_it(rows, columns, tmp_path):
    """By a tensor that names the format, by the file's header, and in parts of rows."""
    tensors, want = nvfp4(rows, columns)
    entry = np.frombuffer(b'{"format": "nvfp4"}', np.uint8)
    header = {"_quantization_metadata": json.dumps({"layers": {"l": {"format": "nvfp4"}}})}
    for given in ((tensors | {"l.comfy_quant": entry}, None), (tensors, header)):
        (weight,) = values_of(tmp_path, *given).values()
        assert weight.shape == want.shape
        np.testing.assert_array_equal(weight.view(), want)
    parts = [part.view() for part in weight.split(3 if rows % 3 == 0 else 2)]
    np.testing.assert_array_equal(np.concatenate(parts), want)


def test_float8_is_what_comfy_kitchen_makes_of_it(tmp_path):
    with comfy_kitchen.use_backend("eager"):
        x, scale = torch.randn(8, 16), torch.tensor(0.0123)
        small = comfy_kitchen.quantize_per_tensor_fp8(x, scale, torch.float8_e4m3fn)
        want = comfy_kitchen.dequantize_per_tensor_fp8(small, scale, torch.float32)
    stored = small.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    tensors = {"l.weight": stored, "l.weight_scale": scale.numpy()}
    (weight,) = values_of(tmp_path, tensors).values()
    np.testing.assert_array_equal(weight.view(), want.numpy())


@pytest.mark.parametrize("group", [0, 4, 16, 256])
def test_int8_is_what_comfy_kitchen_makes_of_it(group, tmp_path):
    """With a scale per row; rotated in groups, as far as float32 sums, and in parts of rows."""
    with comfy_kitchen.use_backend("eager"):
        quantised, params = TensorWiseINT8Layout.quantize(
            torch.randn(12, 512), per_channel=True, convrot=group > 0, convrot_groupsize=group)
        want = TensorWiseINT8Layout.dequantize(quantised, params).numpy()
    entry = {"format": "int8_tensorwise"}
    if group:
        entry |= {"convrot": True, "convrot_groupsize": group}
    (weight,) = values_of(tmp_path, {
        "l.weight": quantised.numpy(), "l.weight_scale": params.scale.numpy(),
        "l.comfy_quant": np.frombuffer(json.dumps(entry).encode(), np.uint8),
    }).values()
    np.testing.assert_allclose(weight.view(), want, atol=1e-5 if group else 0, rtol=0)
    parts = [part.view() for part in weight.split(3)]
    np.testing.assert_allclose(np.concatenate(parts), want, atol=1e-5 if group else 0, rtol=0)


SMALL = np.zeros((4, 16), ml_dtypes.float8_e4m3fn)
ONE = np.ones((), np.float32)


@pytest.mark.parametrize("tensors, words", [
    ({"weight": SMALL.astype("i1"), "weight_scale": ONE, "comfy_quant": {
        "format": "int8_blockwise", "group_size": 8}},
     "l.weight: stored as int8_blockwise, which is not read here; take the model's file in bfl"),
    ({"weight": SMALL.astype("i1"), "weight_scale": ONE}, "expected float8 beside weight_scale, f"),
    ({"weight": SMALL.astype("i1"), "weight_scale": ONE, "comfy_quant": {
        "format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 8}},
     "a convrot_groupsize that is a power of 4 and divides the 16 columns, got 8"),
    ({"weight": SMALL.astype("i1"), "weight_scale": ONE, "comfy_quant": {
        "format": "int8_tensorwise", "convrot": True}}, "divides the 16 columns, got 256"),
    ({"weight": SMALL, "weight_scale": ONE, "comfy_quant": {"format": E4M3, "convrot": True}},
     "stored as float8_e4m3fn with convrot, which is not read here"),
    ({"weight": SMALL, "comfy_quant": {"format": E4M3}}, "but its weight_scale is missing"),
    ({"weight": SMALL, "weight_scale": ONE, "comfy_quant": {"format": E5M2}},
     "expected float8_e5m2 beside weight_scale, found float8_e4m3fn"),
    ({"weight": SMALL.astype("f4"), "weight_scale": ONE}, "expected float8 beside weight_scale"),
    ({"weight": SMALL, "weight_scale": ONE, "scale_weight": ONE},
     "expected one scale, found weight_scale and scale_weight"),
    ({"weight": SMALL, "weight_scale": np.zeros((4, 1), "u1")}, "of floats, found uint8"),
    ({"weight": SMALL, "weight_scale": np.ones((4, 2), "f4")},
     r"one number or one per row, \(4,\), found \(4, 2\)"),
    ({"weight": SMALL, "weight_scale": ONE * np.inf}, "holds NaN or infinity"),
    ({"weight": SMALL, "pre_quant_scale": ONE}, "has a pre_quant_scale, which is not read"),
    ({"weight": SMALL.view("u1"), "weight_scale_2": ONE}, "nvfp4, but its weight_scale is missing"),
    ({"weight": SMALL.view("u1"), "weight_scale_2": ONE, "weight_scale": SMALL},
     "with 512 scales in float8, found uint8"),
    ({"weight": SMALL, "comfy_quant": b"{"}, "l.comfy_quant: expected JSON in bytes"),
    ({"weight": SMALL, "comfy_quant": {}}, "expected an entry that names its format, got {}"),
])
def test_what_is_not_read_is_named_with_the_reason(tensors, words, tmp_path):
    entry = tensors.get("comfy_quant")
    if entry is not None:
        text = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
        tensors = tensors | {"comfy_quant": np.frombuffer(text, np.uint8)}
    with pytest.raises(WeightsError, match=words):
        values_of(tmp_path, {f"l.{n}": np.array(x) for n, x in tensors.items()})


def test_a_header_that_is_no_table_of_layers_is_named(tmp_path):
    with pytest.raises(WeightsError, match="_quantization_metadata: expected JSON with layers"):
        values_of(tmp_path, {"l.weight": SMALL}, {"_quantization_metadata": "[1]"})
