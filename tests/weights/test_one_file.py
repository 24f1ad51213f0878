"""Checkpoints of one file each, as ComfyUI keeps them: read exactly, or refused by name."""

import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from ml_collections import ConfigDict
from one_file_examples import PREFIXES, assert_same, params_of, tensors_of
from safetensors.numpy import save_file

from dopsd_jax import export, sample
from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.run import model as model_lib
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights import WeightsError, fingerprints, load_pipeline, load_vision_language
from dopsd_jax.weights.families import DECODER
from dopsd_jax.weights.one_file import KEYS, PARTS
from dopsd_jax.weights.shapes import transformer_shapes

CONVERTERS = {
    "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_the_files_of_these_tests_are_what_diffusers_converters_take(name, request):
    """They make of each file the tensors that it was made from."""
    model = request.getfixturevalue(name)
    config = {k: [None] * 4 for k in ("down_block_types", "up_block_types")}
    for part, convert in (
        ("transformer", CONVERTERS[name]),
        ("vae", lambda x: single_file_utils.convert_ldm_vae_checkpoint(x, config)),
    ):
        want = tensors_of(model.whole / part)
        got = convert({n: torch.from_numpy(np.array(x)) for n, x in model.parts[part].items()})
        if part == "vae":  # the converter knows nothing of what FLUX.2 has around the network
            want = {n: x for n, x in want.items() if not n.startswith(("bn.", "quant", "post_q"))}
        assert got.keys() == want.keys()
        for key, x in want.items():
            np.testing.assert_array_equal(got[key].numpy(), x, err_msg=key)


@pytest.mark.parametrize("name, prefix", [
    ("z_image", "none"), ("z_image", "short"), ("flux2", "none"),
])
def test_a_model_of_files_has_the_parameters_of_the_directory(name, prefix, request, tmp_path):
    """Bit for bit, from a directory that holds no weights at all."""
    model = request.getfixturevalue(name)
    pipe = load_pipeline(model.small, **model.files(tmp_path / "files", prefix))
    assert_same(model.params, params_of(pipe))


def test_one_file_stands_beside_a_directory_and_the_decoder_needs_no_encoder(model, tmp_path):
    file = model.files(tmp_path / "files")["vae_file"]
    want = load_pipeline(model.whole, parts=(DECODER,)).vae_params
    assert "encoder" not in want
    assert_same(want, load_pipeline(model.whole, parts=(DECODER,), vae_file=file).vae_params)
    diffusers = model.whole / "vae" / "diffusion_pytorch_model.safetensors"  # of that layout
    pipe = load_pipeline(model.small, parts=("vae",), vae_file=diffusers)
    assert_same(model.params["vae"], pipe.vae_params)


def test_one_file_of_a_whole_model_is_read_part_by_part(model, tmp_path):
    """As ComfyUI saves a checkpoint, with a number that its text encoders have beside."""
    names = PREFIXES["ComfyUI's"]
    together = {names[part] + n: x for part in PARTS for n, x in model.parts[part].items()}
    together["text_encoders.qwen3_4b.logit_scale"] = np.float32([4.6])
    save_file(together, tmp_path / "all.safetensors")
    got = load_pipeline(model.small, **dict.fromkeys(KEYS, tmp_path / "all.safetensors"))
    assert_same(model.params, params_of(got))


def test_it_draws_the_same_picture(z_image, tmp_path):
    files = z_image.files(tmp_path / "files", "ComfyUI's")
    np.testing.assert_array_equal(*(
        sample.generate(pipe, ["a fox"], num_steps=1, height=64, width=64)
        for pipe in (load_pipeline(z_image.whole, dtype="float32"),
                     load_pipeline(z_image.small, dtype="float32", **files))
    ))


def test_the_vision_tower_stands_on_a_text_encoder_of_one_file(z_image, tiny, tmp_path):
    files = z_image.files(tmp_path / "files", "ComfyUI's")
    pipe = load_pipeline(z_image.small, parts=(), **files)
    assert load_vision_language(tiny.vlm, pipe).matched == len(z_image.parts["text_encoder"])


def test_merged_weights_are_written_as_diffusers_names_them(model, tmp_path):
    """A LoRA that changes nothing, merged into a file of the makers' layout."""
    file = model.files(tmp_path / "files")["transformer_file"]
    pipe = load_pipeline(model.whole, parts=())
    shapes = transformer_shapes(pipe.denoiser.network)
    lora = lora_lib.init(jax.random.key(0), shapes, pipe.lora.targets["published"], 2)
    export.export_loras(str(model.small), [(lora, 1.0)], "diffusers", str(tmp_path / "out"),
                        full=True, transformer_file=file)
    want, got = tensors_of(model.whole / "transformer"), tensors_of(tmp_path / "out")
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_a_run_that_trained_the_weights_of_a_file_is_written_in_its_dtypes(z_image, tmp_path):
    """What was float8 in bfloat16, all else as it was, under diffusers' names."""
    tensors = {n: x.astype(ml_dtypes.float8_e4m3fn) if n.endswith(".qkv.weight") else x
               for n, x in z_image.parts["transformer"].items()}
    save_file(tensors, tmp_path / "x.safetensors")
    workdir_lib.claim(tmp_path / "run", {
        "model": str(z_image.small), "transformer_file": str(tmp_path / "x.safetensors"),
        "trainable": "full", "teacher": "ema", "lora": {"rank": 2, "alpha": 4.0},
    }, {})
    trained = jax.tree.map(np.asarray, z_image.params["transformer"])
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(5, {"student": trained, "teacher": trained}, {"step": 5})
    checkpoints.close()
    export.export(tmp_path / "run", "diffusers", tmp_path / "out")
    got = tensors_of(tmp_path / "out")
    want = tensors_of(z_image.whole / "transformer")
    assert got.keys() == want.keys()
    for name, x in want.items():
        kept = ml_dtypes.bfloat16 if ".attention.to_" in name and "out" not in name else np.float32
        assert got[name].dtype == kept, name
        rounded = x.astype(ml_dtypes.bfloat16).astype(kept)  # params are those of bfloat16
        np.testing.assert_array_equal(got[name], rounded, err_msg=name)


def changed(tensors, **changes):
    """The same with other tensors, or without those that are None."""
    found = tensors | {n.replace("__", "."): x for n, x in changes.items()}
    return {n: x for n, x in found.items() if x is not None}


LORA = {f"diffusion_model.layers.0.attention.to_q.lora_{p}.weight": np.zeros((2, 2), "f4")
        for p in "AB"}
PAIR = np.zeros((2, 2), "f4")
REFUSED = {  # a file's tensors, given as what, and what is said
    "a LoRA": ("transformer", lambda a, b: LORA,
               "expected the transformer of a ZImagePipeline, got a LoRA, which goes on top"),
    "another family": ("transformer", lambda a, b: b.parts["transformer"],
                       "got the transformer of a Flux2KleinPipeline"),
    "another part": ("transformer", lambda a, b: a.parts["vae"], "got the VAE of one"),
    "a transformer": ("text_encoder", lambda a, b: a.parts["transformer"],
                      "expected the text encoder of a ZImagePipeline, got the transformer of one"),
    "nothing known": ("vae", lambda a, b: {"x": PAIR}, "got 1 tensors of something else, "
                      "such as x"),
    "both layouts": ("transformer",
                     lambda a, b: a.parts["transformer"] | tensors_of(a.whole / "transformer"),
                     "parameter layers/attention/to_q/kernel is already filled by"),
    "a missing tensor": (
        "transformer", lambda a, b: changed(a.parts["transformer"],
                                            layers__1__attention__qkv__weight=None),
        "parameter layers/attention/to_k/kernel, layers [1]: no tensor in the files fills it"),
    "an unknown tensor": ("vae", lambda a, b: a.parts["vae"] | {"encoder.mask": PAIR},
                          "encoder.mask: expected exactly one rule of the table, matched none"),
    "another size": ("vae", lambda a, b: {n: x[:2] for n, x in a.parts["vae"].items()},
                     "expected a shape that becomes"),
    "integers": ("text_encoder",
                 lambda a, b: {n: x.astype(np.int8) for n, x in a.parts["text_encoder"].items()},
                 "quantised weights are not read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_file_is_refused_by_its_headers_with_what_it_is(case, z_image, flux2, tmp_path):
    part, tensors, words = REFUSED[case]
    save_file(tensors(z_image, flux2), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError) as e:
        load_pipeline(z_image.small, parts=(), **{f"{part}_file": tmp_path / "x.safetensors"})
    assert str(e.value).startswith(f"{part}_file: {tmp_path}/x.safetensors: ")
    assert words in str(e.value)


@pytest.mark.parametrize("name, content, words", [
    ("x.gguf", b"GGUF\3\0\0\0" + bytes(64), "a GGUF file, whose blocks are not read here; take"),
    ("x.ckpt", b"\x80\x02}", "a pickled file can run code when opened and is never read here"),
    ("x.safetensors", b"\xff" * 8 + b"{}", "truncated or not a safetensors file"),
    ("folder", None, "expected a .safetensors file, found a directory"),
    ("nowhere.safetensors", "", "no such file"),
])
def test_files_of_other_kinds_are_refused_together(name, content, words, z_image, tmp_path):
    file = tmp_path / name
    if content is None:
        file.mkdir()
    elif content:
        file.write_bytes(content)
    with pytest.raises(WeightsError) as e:
        load_pipeline(z_image.small, parts=(), vae_file=file, transformer_file=file)
    first, second = str(e.value).split("\n")
    for key, line in (("transformer_file", first), ("vae_file", second)):
        assert line.startswith(f"{key}: {file}: {words}")


def test_a_run_is_the_same_wherever_its_files_lie_and_another_with_other_files(
    z_image, tmp_path
):
    files = z_image.files(tmp_path / "files")
    config = ConfigDict({"model": str(z_image.small), **files})
    first = model_lib.fingerprint(config)
    shutil.copytree(tmp_path / "files", tmp_path / "elsewhere")
    moved = {k: str(tmp_path / "elsewhere" / f"{k.removesuffix('_file')}.safetensors")
             for k in files}
    assert model_lib.fingerprint({"model": str(z_image.whole), **moved}) == first
    assert model_lib.fingerprint({"model": str(z_image.whole)}) != first
    for part in PARTS:
        tensors = dict(z_image.parts[part])
        name = sorted(tensors)[-1]
        tensors[name] = tensors[name] + np.float32(1)
        save_file(tensors, moved[f"{part}_file"])
        now = {p: model_lib.fingerprint({"model": str(z_image.small), **moved}, (p,))
               for p in PARTS}
        before = {p: model_lib.fingerprint(config, (p,)) for p in PARTS}
        assert {p for p in PARTS if now[p] != before[p]} == set(PARTS[: PARTS.index(part) + 1])
    assert model_lib.fingerprint({"model": str(z_image.small), **moved}) != first


def test_a_run_without_files_is_identified_as_before_there_were_any(tiny):
    assert model_lib.fingerprint({"model": str(tiny.pipeline)}) == fingerprints.fingerprint(
        tiny.pipeline)
    with pytest.raises(WeightsError, match="expected .safetensors files in it or below"):
        fingerprints.fingerprint(tiny.pipeline, ("tokenizer",))
