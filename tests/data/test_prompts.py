"""Prompts -> ids and masks; images -> patches."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as reference_resize,
)

from dopsd_jax.data.prompts import (
    encode_image_prompts,
    encode_prompts,
    image_patches,
    image_token_id,
    load_tokenizer,
    prompt_problems,
    smart_resize,
)

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<think>",
    "</think>",
]
# The turns of a user as the Qwen3 and Qwen3-VL templates write them.
TEXT_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
IMAGE_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.content is string %}{{- m.content }}{%- else %}{%- for part in m.content %}"
    "{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def save_tokenizer(directory, template, special=SPECIAL, **config):
    """A byte-level tokenizer without merges: one token per byte of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in special])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", **config}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("a") / "text", TEXT_TEMPLATE))


@pytest.fixture(scope="module")
def image_tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("b") / "vl", IMAGE_TEMPLATE))


def decode(tokenizer, ids, mask):
    return [tokenizer.decode(row[m]) for row, m in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("thinking,end", [(True, ""), (False, "<think>\n\n</think>\n\n")])
def test_the_template_is_applied_once_and_rows_are_padded_on_the_right(
    text_tokenizer, thinking, end
):
    prompts = ["a red fox", "ein grüner Hut ☂"]
    ids, mask = encode_prompts(text_tokenizer, prompts, 64, enable_thinking=thinking)
    assert (ids.dtype, mask.dtype, ids.shape, mask.shape) == (np.int32, bool, (2, 64), (2, 64))
    assert decode(text_tokenizer, ids, mask) == [
        f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n{end}" for p in prompts
    ]
    assert np.all(ids[~mask] == text_tokenizer.pad_token_id)
    lengths = mask.sum(1)
    assert lengths[0] != lengths[1]
    np.testing.assert_array_equal(mask, np.arange(64) < lengths[:, None])


def test_the_callers_prompts_stay_as_they_are(text_tokenizer):
    prompts = ["a red fox"]
    first = encode_prompts(text_tokenizer, prompts, 64, enable_thinking=True)
    assert prompts == ["a red fox"]
    second = encode_prompts(text_tokenizer, prompts, 64, enable_thinking=True)
    np.testing.assert_array_equal(first[0], second[0])


def test_a_long_prompt_is_an_error_unless_truncation_is_asked_for(text_tokenizer):
    prompts = ["short", "x" * 40, "y" * 50]
    full, mask = encode_prompts(text_tokenizer, prompts, 128, enable_thinking=True)
    n = mask.sum(1)
    with pytest.raises(
        ValueError, match=rf"at most 32 tokens.*prompt 1 has {n[1]}; prompt 2 has {n[2]};"
    ):
        encode_prompts(text_tokenizer, prompts, 32, enable_thinking=True)
    ids, mask = encode_prompts(text_tokenizer, prompts, 32, enable_thinking=True, truncate=True)
    np.testing.assert_array_equal(ids, full[:, :32])
    assert mask[1:].all()
    encode_prompts(text_tokenizer, prompts, int(n.max()), enable_thinking=True)  # just fits


@pytest.mark.parametrize(
    "prompts,words",
    [
        (["a", "", " \n"], r"prompts \[1, 2\] of 3 are empty"),
        ([], "no prompts"),
        ("a fox", "the string 'a fox'"),
    ],
)
def test_empty_prompts_are_an_error(text_tokenizer, image_tokenizer, prompts, words):
    with pytest.raises(ValueError, match=words):
        encode_prompts(text_tokenizer, prompts, 64, enable_thinking=True)
    with pytest.raises(ValueError, match=words):
        encode_image_prompts(image_tokenizer, prompts, 4, 64)


def test_the_image_stands_before_the_prompt_with_all_its_tokens(image_tokenizer):
    ids, mask = encode_image_prompts(image_tokenizer, ["a fox", "hats"], 6, 64)
    assert decode(image_tokenizer, ids, mask) == [
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>{p}<|im_end|>\n"
        "<|im_start|>assistant\n"
        for p in ("a fox", "hats")
    ]
    token = image_token_id(image_tokenizer)
    assert token == image_tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (ids == token).sum(1).tolist() == [6, 6]


def test_truncation_never_cuts_into_the_image(image_tokenizer):
    with pytest.raises(ValueError, match="at most 40 tokens"):
        encode_image_prompts(image_tokenizer, ["f" * 40], 6, 40)
    _, mask = encode_image_prompts(image_tokenizer, ["f" * 40], 6, 40, truncate=True)
    assert mask.all()
    with pytest.raises(ValueError, match="50 image tokens and the template do not fit"):
        encode_image_prompts(image_tokenizer, ["f" * 40], 50, 40, truncate=True)


def test_image_prompts_need_an_image_template_and_a_prompt_without_image_tokens(
    text_tokenizer, image_tokenizer, tmp_path
):
    with pytest.raises(ValueError, match=r"prompt 1 contains <\|image_pad\|>"):
        encode_image_prompts(image_tokenizer, ["a", "b <|image_pad|>"], 6, 64)
    deaf = load_tokenizer(
        save_tokenizer(tmp_path / "deaf", TEXT_TEMPLATE.replace(
            "m.content", "(m.content if m.content is string else '')"
        ))
    )
    with pytest.raises(ValueError, match="chat template makes 0 of 1 image"):
        encode_image_prompts(deaf, ["a"], 6, 64)
    plain = load_tokenizer(save_tokenizer(tmp_path / "plain", IMAGE_TEMPLATE, SPECIAL[:3]))
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|image_pad\|>"):
        encode_image_prompts(plain, ["a"], 6, 64)


def test_what_a_tokenizers_folder_lacks_is_said(tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a tokenizer"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/vocab.json").touch()
    with pytest.raises(ValueError, match=r"expected tokenizer\.json, found vocab\.json"):
        load_tokenizer(tmp_path / "empty")
    bare = save_tokenizer(tmp_path / "bare", None)
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(bare)
    with pytest.raises(ValueError, match="names no pad_token"):
        load_tokenizer(save_tokenizer(tmp_path / "padless", TEXT_TEMPLATE, pad_token=None))
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": IMAGE_TEMPLATE}))
    assert load_tokenizer(bare).chat_template == IMAGE_TEMPLATE
    (bare / "chat_template.json").unlink()
    (bare / "chat_template.jinja").write_text(TEXT_TEMPLATE)
    assert load_tokenizer(bare).chat_template == TEXT_TEMPLATE


def test_prompts_are_encoded_without_importing_torch(tmp_path):
    directory = save_tokenizer(tmp_path / "text", TEXT_TEMPLATE)
    code = (
        "import sys; from dopsd_jax.data.prompts import encode_prompts, load_tokenizer\n"
        f"encode_prompts(load_tokenizer({str(directory)!r}), ['a'], 64, enable_thinking=True)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "size,want",
    [
        ((1024, 1024), (768, 768)),
        ((1152, 896), (864, 672)),
        ((1152, 864), (864, 640)),
        ((1248, 832), (928, 608)),
        ((1280, 720), (1024, 576)),
        ((1344, 576), (1152, 480)),
    ],
)
def test_buckets_become_the_published_sizes(size, want):
    assert smart_resize(*size) == want
    assert smart_resize(*size[::-1]) == want[::-1]


def test_small_images_grow_and_extreme_ones_are_an_error():
    assert smart_resize(100, 130) == (480, 608)
    assert smart_resize(48, 80, 1, 10**6, 32) == (64, 64)  # halves go to the even neighbour
    smart_resize(20, 4000)
    with pytest.raises(ValueError, match="image of 4001x20: expected an aspect ratio"):
        smart_resize(20, 4001)


def test_any_size_becomes_what_transformers_makes_of_it():
    for h, w in np.random.default_rng(0).integers(16, 2500, (500, 2)).tolist():
        assert smart_resize(h, w) == reference_resize(h, w, 32, 512 * 512, 768 * 768), (h, w)


def processor():
    return Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 512 * 512, "longest_edge": 768 * 768},
    )


def test_patches_equal_transformers_where_nothing_is_resized():
    pixels = np.random.default_rng(0).integers(0, 256, (512, 768, 3)).astype(np.uint8)
    want = processor()(images=[pixels], return_tensors="np")
    got, grid = image_patches(pixels.astype(np.float32) / 127.5 - 1)
    assert [[1, *grid]] == want["image_grid_thw"].tolist() == [[1, 32, 48]]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want["pixel_values"], atol=2e-6)


@pytest.mark.parametrize("size", [(900, 1200), (150, 130)])
def test_the_resize_is_torchs_antialiased_bicubic_in_float(size):
    pixels = np.random.default_rng(0).uniform(-1, 1, (*size, 3)).astype(np.float32)
    got, (gh, gw) = image_patches(pixels)
    # In float64: torch's float32 rounds the weights themselves, which is 1e-4 of noise here.
    want = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).double().permute(2, 0, 1)[None],
        (gh * 16, gw * 16),
        mode="bicubic",
        antialias=True,
    )[0].numpy()
    x = got.reshape(gh // 2, gw // 2, 2, 2, 3, 2, 16, 16)
    np.testing.assert_array_equal(x[..., 0, :, :], x[..., 1, :, :])
    back = x[..., 0, :, :].transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, gh * 16, gw * 16)
    np.testing.assert_allclose(back, want, rtol=0, atol=1e-6)


def test_a_smooth_image_agrees_with_transformers_to_its_8_bit_rounding():
    y, x = np.mgrid[:600, :900] / 150.0
    pixels = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1) * 100 + 128
    pixels = pixels.astype(np.uint8)
    want = processor()(images=[pixels], return_tensors="np")
    got, grid = image_patches(pixels.astype(np.float32) / 127.5 - 1)
    assert [[1, *grid]] == want["image_grid_thw"].tolist()
    assert np.abs(got - want["pixel_values"]).max() < 2 / 127.5


def test_other_arrays_than_float_images_are_an_error():
    with pytest.raises(ValueError, match="got uint8"):
        image_patches(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(64, 64, 4\)"):
        image_patches(np.zeros((64, 64, 4), np.float32))


def test_transformers_does_not_complain_where_there_is_no_torch():
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a)\n"
        "sys.modules['torch'] = None\n"
        "import dopsd_jax.data.prompts"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env,
                          check=True)
    assert done.stdout + done.stderr == ""


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 11422654\n"


@pytest.mark.parametrize("name,text,message", [
    ("tokenizer.json", '{"version": "1.0", "trun', "is damaged .*download it again"),
    ("tokenizer.json", "", "is damaged .*download it again"),
    ("tokenizer.json", "[]", "is damaged .*download it again"),
    ("tokenizer.json", LFS_POINTER, "/tokenizer.json: this is a git-lfs pointer, .*git lfs pull"),
    ("tokenizer_config.json", "[]", "is damaged .*download it again"),
    ("tokenizer_config.json", "{", "is damaged .*download it again"),
    ("tokenizer_config.json", LFS_POINTER, "this is a git-lfs pointer"),
    ("chat_template.jinja", "{% for %}", r"cannot be rendered \(TemplateSyntaxError: "),
    ("chat_template.jinja", "{{ nope.x }}", "cannot be rendered .*'nope' is undefined"),
    ("chat_template.jinja", "{{ message }}", "template leaves the prompt out, it makes ''"),
])
def test_damaged_files_of_a_tokenizer_are_named(tmp_path, name, text, message):
    directory = save_tokenizer(tmp_path / "tokenizer", TEXT_TEMPLATE)
    load_tokenizer(directory)
    (directory / name).write_text(text)
    with pytest.raises(ValueError, match=message) as e:
        load_tokenizer(directory)
    assert str(e.value).startswith(str(directory))


def test_what_is_no_text_is_named_with_its_number(text_tokenizer):
    prompts = ["a", None, b"fox", os.fsdecode(b"caf\xe9"), " "]
    assert prompt_problems(text_tokenizer, prompts, 64, enable_thinking=True) == [
        "prompt 1 is no text: expected a str, got NoneType None",
        "prompt 2 is no text: expected a str, got bytes b'fox'",
        r"prompt 3 ('caf\udce9') is no valid UTF-8: character 3 stands for a stray byte",
        "prompt 4 is empty",
    ]
    with pytest.raises(ValueError, match=r"prompt 1 is no text.*prompt 3 \('caf.udce9'\) is no "):
        encode_prompts(text_tokenizer, prompts, 64, enable_thinking=True)
