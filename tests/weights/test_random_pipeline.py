"""The tiny random models open in diffusers and transformers exactly as the published ones do."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file

from dopsd_jax.weights.load import weight_files
from dopsd_jax.weights.random_pipeline import write_random_pipeline

PARTS = {
    "transformer": diffusers.ZImageTransformer2DModel,
    "vae": diffusers.AutoencoderKL,
    "text_encoder": transformers.Qwen3Model,
}


def load_complete(cls, path):
    """Opens a model and checks that files and model name the same tensors."""
    model, info = cls.from_pretrained(path, output_loading_info=True)
    info = {kind: list(info[kind]) for kind in ("missing_keys", "unexpected_keys")}
    assert info == {"missing_keys": [], "unexpected_keys": []}
    return model.eval()


def tensors(directory):
    return {k: v for f in weight_files(directory) for k, v in load_file(f).items()}


def sample(pipe, prompt, **kwargs):
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    return pipe(
        prompt, height=64, width=96, num_inference_steps=2, guidance_scale=0.0, latents=noise,
        output_type="np", **kwargs,
    ).images


@pytest.fixture(scope="module")
def pipe(tiny):
    pipe = diffusers.ZImagePipeline.from_pretrained(tiny.pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("part", PARTS)
def test_every_tensor_of_the_pipeline_is_used_and_none_is_missing(tiny, part):
    model = load_complete(PARTS[part], tiny.pipeline / part)
    prefix = "model." if part == "text_encoder" else ""
    stored = tensors(tiny.pipeline / part)
    assert set(stored) == {prefix + name for name in model.state_dict()}
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), stored[prefix + name])
        assert value.abs().max() > 0


def test_every_tensor_of_the_vlm_is_used_and_only_the_tied_head_is_not_stored(tiny):
    model = load_complete(transformers.Qwen3VLForConditionalGeneration, tiny.vlm)
    assert set(model.state_dict()) - set(tensors(tiny.vlm)) == {"lm_head.weight"}
    embedding = model.model.language_model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == embedding.data_ptr()


def test_configs_say_what_the_libraries_understand(tiny, pipe):
    vlm = transformers.AutoConfig.from_pretrained(tiny.vlm)
    assert pipe.text_encoder.config.rope_parameters["rope_theta"] == 1e6
    assert vlm.text_config.rope_parameters["rope_theta"] == 5e6
    assert vlm.text_config.rope_parameters["mrope_section"] == [4, 2, 2]
    assert vlm.vision_config.deepstack_visual_indexes == [0, 2]
    assert not pipe.scheduler.config.use_dynamic_shifting
    assert pipe.scheduler.config.shift == 3.0
    for part in (pipe.transformer, pipe.vae):  # the files leave no key to a class default
        stored = json.loads((tiny.pipeline / part.config._name_or_path / "config.json").read_text())
        own = {k for k in part.config if not k.startswith("_")}
        assert own == {k for k in stored if not k.startswith("_")}


def test_transformer_is_sharded_and_the_index_is_true(tiny):
    directory = tiny.pipeline / "transformer"
    index = json.loads(
        (directory / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    files = weight_files(directory)
    assert [f.name for f in files] == [
        f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    total = sum(v.nbytes for v in tensors(directory).values())
    assert index["metadata"] == {"total_size": total}


def test_language_model_of_the_vlm_has_the_shapes_but_not_the_values_of_the_text_encoder(tiny):
    own = {
        k.removeprefix("model.language_model."): v
        for k, v in tensors(tiny.vlm).items()
        if ".language_model." in k
    }
    encoder = {
        k.removeprefix("model."): v for k, v in tensors(tiny.pipeline / "text_encoder").items()
    }
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in encoder.items()}
    assert all((own[k] != encoder[k]).any() for k in own)


def test_pipeline_samples_pictures_that_follow_the_prompt_and_do_not_saturate(pipe):
    image = sample(pipe, ["a red cube"])
    assert image.shape == (1, 64, 96, 3)
    assert np.isfinite(image).all()
    assert np.mean((image > 0) & (image < 1)) > 0.5
    assert np.abs(image - sample(pipe, ["two green birds on a wire"])).mean() > 1 / 255


def test_a_caption_of_512_tokens_fits(pipe):
    assert np.isfinite(sample(pipe, ["word " * 600])).all()


def test_pipeline_template_opens_no_think_block_unless_thinking_is_off(tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.pipeline / "tokenizer")
    messages = [{"role": "user", "content": "a red cube"}]

    def text(**kwargs):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **kwargs
        )

    plain = "<|im_start|>user\na red cube<|im_end|>\n<|im_start|>assistant\n"
    assert text(enable_thinking=True) == plain
    assert text() == plain
    assert text(enable_thinking=False) == plain + "<think>\n\n</think>\n\n"


def test_tokenizer_is_reversible_normalises_and_pads_on_the_right(tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.pipeline / "tokenizer")
    text = "The cat's 12 naïve 雪 🙂\n\n  <|im_end|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer("nai\u0308ve").input_ids == tokenizer("naïve").input_ids
    assert len(tokenizer(" the").input_ids) == 1  # merged
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id]
    padded = tokenizer("ab", padding="max_length", max_length=4, truncation=True)
    assert padded.input_ids[2:] == [tokenizer.convert_tokens_to_ids("<|endoftext|>")] * 2
    assert padded.attention_mask == [1, 1, 0, 0]
    assert max(tokenizer.get_vocab().values()) < 320


def test_tokenizer_json_alone_means_the_same_as_the_qwen2_class(tiny):
    # transformers 5 rebuilds normaliser and word pattern in its class; other readers use the file.
    for directory in (tiny.pipeline / "tokenizer", tiny.vlm):
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert type(tokenizer) is transformers.Qwen2Tokenizer
        stored = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        for text in ("The cat's at 1234...\n\n  ok", "nai\u0308ve ½ 雪🙂", "<|im_end|>a<think> b"):
            assert stored.encode(text).ids == tokenizer(text).input_ids
            assert stored.decode(stored.encode(text).ids) == tokenizer.decode(
                tokenizer(text).input_ids, skip_special_tokens=True
            )


def test_vlm_template_puts_the_image_before_the_prompt(tiny):
    processor = transformers.AutoTokenizer.from_pretrained(tiny.vlm)
    content = [{"type": "image"}, {"type": "text", "text": "a red cube"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a red cube<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    config = json.loads((tiny.vlm / "config.json").read_text())
    ids = processor(text).input_ids
    for token in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert ids.count(config[token]) == 1


def test_vlm_encodes_an_image(tiny):
    images = transformers.AutoImageProcessor.from_pretrained(tiny.vlm)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8)
    small = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    batch = images(Image.fromarray(pixels), size=small, return_tensors="pt")
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tiny.vlm)
    config = model.config
    count = int(batch.image_grid_thw.prod()) // 4
    ids = torch.tensor(
        [[5, config.vision_start_token_id] + [config.image_token_id] * count + [9, 10]]
    )
    hidden = model(
        input_ids=ids, mm_token_type_ids=(ids == config.image_token_id).int(),
        output_hidden_states=True, **batch,
    ).hidden_states
    assert batch.pixel_values.shape[1] == 3 * 2 * 16 * 16
    assert len(hidden) == 5
    assert 0.3 < hidden[-2].std() < 10


def digest(directories):
    return {
        str(f.relative_to(d)): f.read_bytes()
        for d in directories for f in sorted(d.rglob("*")) if f.is_file()
    }


def test_a_seed_fixes_every_byte_and_another_changes_every_tensor(tiny, tmp_path):
    first = digest((tiny.pipeline, tiny.vlm))
    same = digest(write_random_pipeline(tmp_path / "a", seed=0))
    other_dirs = write_random_pipeline(tmp_path / "b", seed=1)
    other = digest(other_dirs)
    assert same == first
    assert set(other) == set(first)
    changed = {f for f in first if first[f] != other[f]}
    assert changed == {f for f in first if f.endswith(".safetensors")}
    for part in PARTS:
        ours, theirs = tensors(tiny.pipeline / part), tensors(other_dirs[0] / part)
        assert all((ours[k] != theirs[k]).any() for k in ours)


def test_other_dtypes_and_bare_text_encoder_names_open_too(tmp_path):
    pipeline, vlm = write_random_pipeline(tmp_path, dtype="bfloat16", text_encoder_prefix="")
    encoder = load_complete(transformers.Qwen3Model, pipeline / "text_encoder")
    assert set(tensors(pipeline / "text_encoder")) == set(encoder.state_dict())
    assert encoder.dtype == torch.bfloat16
    model = load_complete(transformers.Qwen3VLForConditionalGeneration, vlm)
    assert model.dtype == torch.bfloat16


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, monkeypatch):
    import dopsd_jax.weights.random_pipeline as module

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(module, "_write_vlm", fail)
        write_random_pipeline(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_random_pipeline(tmp_path)
    with pytest.raises(FileExistsError, match=r"z_image_tiny.*qwen3_vl_tiny: exists already"):
        write_random_pipeline(tmp_path)
    with pytest.raises(ValueError, match="expected float32, float16 or bfloat16, got 'int8'"):
        write_random_pipeline(tmp_path / "x", dtype="int8")


def test_the_command_writes_the_same_without_torch(tiny, tmp_path):
    code = (
        "import sys; from dopsd_jax.weights.random_pipeline import main; "
        f"main(['--out', {str(tmp_path)!r}]); "
        "print(sorted(m for m in ('torch', 'diffusers') if m in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pipeline, vlm = tmp_path / "z_image_tiny", tmp_path / "qwen3_vl_tiny"
    assert run.stdout.splitlines() == [str(pipeline), str(vlm), "[]"]
    assert digest((pipeline, vlm)) == digest((tiny.pipeline, tiny.vlm))
