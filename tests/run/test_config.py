"""Every impossible config is refused with all its problems, from configs and tokenizer alone."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import common
from configs import tiny as tiny_config
from dopsd_jax.core import trackers
from dopsd_jax.method.train_step import Method
from dopsd_jax.run import config as config_lib
from dopsd_jax.run import model as model_lib
from dopsd_jax.run.config import check_config, check_values
from dopsd_jax.run.keys import KEYS
from dopsd_jax.weights import pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tiny):
    c = tiny_config.get_config()
    c.model, c.vlm, c.data = str(tiny.pipeline), str(tiny.vlm), "photos"
    return c


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(pipeline, "_load", read)


def problems(config, **changes):
    """The lines of the refusal."""
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError) as e:
        check_config(config)
    first, *lines = str(e.value).split("\n  ")
    assert first == "config:"
    return lines


def test_the_shipped_configs_pass(config, tiny):
    assert check_config(config) == Method(lora_scale=2.0, ema_decay=0.99)
    c = common.base()
    c.model, c.vlm, c.data = str(tiny.pipeline), str(tiny.vlm), "photos"
    assert check_config(c) == Method()


def test_all_problems_are_told_and_each_once(config):
    lines = problems(config, **{
        "num_steps": 0, "teacher": "old", "loss": "l1", "ema_decay": 1.5, "accumulation": 0,
        "schedule": "linear", "lora.rank": 0, "lora.targets": "no_such", "model": "nowhere",
        "sample_rows": 0, "mesh.fsdp": 7,
    })
    keys = [line.split(":")[0] for line in lines]
    assert keys == ["num_steps", "schedule", "loss", "teacher", "ema_decay", "lora.rank",
                    "accumulation", "sample_rows", "mesh", "model"]


@pytest.mark.parametrize("key,value,words", [
    ("lora.rank", 0, "a whole number from 1 to 16384, got 0"),
    ("lora.rank", 10**12, "a whole number from 1 to 16384, got 1000000000000"),
    ("num_steps", 1001, "1 to 1000 denoiser calls, got 1001"),
    ("sample_steps", 0, "1 to 1000 denoiser calls, got 0"),
    ("lora.alpha", 0.0, "a number above 0 that float32 holds, got 0.0"),
    ("lora.alpha", float("nan"), "a number above 0 that float32 holds, got nan"),
    ("sample_rows", 0, "a whole number from 1 to 2147483647, got 0"),
    ("sample_every", -1, "a whole number from 0 to 2147483647, got -1"),
    ("remat", "some", "one of ('auto', 'offload', 'full', 'attention', 'matmuls', 'linears', "
                      "'dots', 'activations', 'none'), got 'some'"),
    ("dtype", "float12", "one of ('bfloat16', 'float16', 'float32'), got 'float12'"),
    ("vae_dtype", "int8", "one of ('bfloat16', 'float16', 'float32'), got 'int8'"),
    ("learning_rate", 0.0, "a number above 0 that float32 holds, got 0.0"),
    ("learning_rate", float("inf"), "a number above 0 that float32 holds, got inf"),
    ("text_tokens", 0, "a multiple of 32, from 32 to 32768, got 0"),
    ("seed", -1, "a whole number in [0, 2^32), got -1"),
    ("sample_prompts", (1,), "texts, got [1]"),
    ("learning_rate", 1e39, "a number above 0 that float32 holds, got 1e+39"),
    ("b2", 1 - 1e-9, "a number in [0, 1) that float32 does not round to 1, got 0.999999999"),
    ("vlm_min_pixels", 10**12, "a whole number from 1 to 16777216, got 1000000000000"),
    ("small_buckets", "drop", "one of ('error', 'repeat'), got 'drop'"),
])
def test_values_impossible_by_themselves(config, key, value, words):
    assert problems(config, **{key: value}) == [f"{key}: expected {words}"]


def test_values_that_do_not_go_together(config):
    assert problems(config, batch_size=3, accumulation=2, schedule="reference8", num_steps=4) == [
        "batch_size: expected a multiple of accumulation = 2, got 3",
        "schedule reference8 has 8 steps, got num_steps = 4",
    ]
    changes = dict(batch_size=2, schedule="shifted", shift=1e12, vlm_min_pixels=600_000)
    assert problems(config, **changes) == [
        "shift: expected one with which each of 4 steps lowers sigma in float32, got "
        "1000000000000.0",
        "vlm_min_pixels: expected at most vlm_max_pixels = 589824, got 600000",
    ]


def test_trackers_are_known_and_installed(config, monkeypatch):
    for text in ("tensorboard", "wandb;trackio"):
        assert problems(config, trackers=text) == [
            "trackers: expected nothing, or wandb or trackio, or both with a comma between, got "
            f"{text!r}"]
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    (line,) = problems(config, trackers="wandb")
    assert line.startswith("trackers: wandb is not installed; run: pip install 'dopsd_jax[wandb]'")


def test_what_does_not_fit_the_model(config):
    lines = problems(config, **{
        "lora.targets": "no_such", "text_tokens": 32, "teacher_tokens": 2048,
        "sample_prompts": ("a fox", "a b c d e f g h i j", " "),
    })
    assert lines[0].startswith("LoRA targets: 'no_such' matches no parameter. Expected one of ")
    assert lines[1].startswith("text_tokens, teacher_tokens, buckets: ")
    assert "text length 2048 needs 2050 positions, the checkpoint has 1536, enough for 1504" in (
        lines[1]
    )
    assert lines[2].startswith("sample_prompts: prompt 1 ('a b c d e f g h i j'): expected at most "
                               "32 tokens, template included, got ")
    assert lines[2].endswith("; shorten it (text_tokens = 32)")
    assert lines[3:] == ["sample_prompts: prompt 2 is empty (text_tokens = 32)"]


def test_a_length_that_no_role_uses_need_not_fit(config):
    config.objective, config.teacher_tokens = "sft", 2048
    check_config(config)
    assert "text length 1536 needs 1538 positions" in problems(config, text_tokens=1536)[0]


def test_a_rank_that_no_layer_can_express_is_refused(config):
    assert problems(config, **{"lora.rank": 65}) == [
        "lora.rank: expected at most 64, all that the targeted linear layers can express (the "
        "smaller side of each, of the largest), got 65"
    ]
    config.lora.rank = 64
    check_config(config)


@pytest.mark.parametrize("key", ["model", "vlm", "data", "data_root", "cache", "base_lora"])
@pytest.mark.parametrize("path", ["x" * 5000, "/".join(["x" * 200] * 25), "a\0b"])
def test_a_path_that_no_file_system_takes_is_named(config, key, path):
    (line,) = problems(config, **{key: path})
    assert line.startswith(f"{key}: expected ") and len(line) < 300
    assert "of at most 3000 bytes, each name in it of at most 255, got '" in line
    with pytest.raises(ValueError, match=f"{key}: expected"):
        check_values(config, besides=("model", "vlm", "data"))


def test_many_data_sets_may_be_longer_than_a_name(config):
    config.data = ",".join(f"{i}.jsonl" for i in range(1000))
    check_config(config)


ABSURD = [1e12, 10**12, -1, 0, float("nan"), float("inf"), -float("inf"), 10**400, 10**5000, 1e-300,
          None, True, "x", "", "x" * 5000, [], [None]]


@pytest.fixture(scope="module")
def opened_once():
    """What reads the models, each file once for all tests of this module."""
    return [(module, name, functools.cache(getattr(module, name))) for module, name in (
        (model_lib, "load_pipeline"), (config_lib, "read_vl_config"),
        (config_lib, "transformer_shapes"),
    )]


@pytest.mark.parametrize("key", KEYS)
def test_absurd_values_are_refused_by_name_or_harmless(config, key, monkeypatch, opened_once):
    """Of every key and of any type, as a config file may set them."""
    for patch in opened_once:
        monkeypatch.setattr(*patch)
    for value in ABSURD:
        changed = config.copy_and_resolve_references()
        try:
            with changed.ignore_type():
                changed.update_from_flattened_dict({key: value})
        except OverflowError:  # by ConfigDict, which makes ints floats where the default is one
            continue
        try:
            check_config(changed)
        except ValueError as e:
            assert key.partition(".")[0] in str(e).lower(), (value, str(e))


def test_directories_that_are_not_models(config, tmp_path):
    (tmp_path / "file").write_text("mine")
    lines = problems(config, model=str(tmp_path), vlm=str(tmp_path / "file"))
    assert lines == [
        f"vlm: {tmp_path}/file: expected a directory with config.json and the weights of Qwen3-VL, "
        "found a file",
        f"model: {tmp_path}/model_index.json: no such file; is {tmp_path} complete?",
    ]


def test_a_config_without_a_key_is_refused(config):
    with config.unlocked():
        del config.remat
    assert problems(config) == ["remat: missing; start from configs.common.base()"]


def test_the_batch_must_fit_the_mesh(tiny):
    script = (
        "import sys; from configs.tiny import get_config\n"
        "from dopsd_jax.run.config import check_config\n"
        "c = get_config(); c.model, c.vlm, c.data = *sys.argv[1:], 'photos'\n"
        "c.mesh.fsdp = 2; c.batch_size = 8; check_config(c)\n"
        "c.batch_size = 6\ntry: check_config(c)\nexcept ValueError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tiny.pipeline, tiny.vlm], cwd=ROOT, capture_output=True,
        text=True, check=True, env=dict(
            os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS="--xla_force_host_platform_device_count=4"
        ),
    )
    assert done.stdout == (
        "config:\n  batch_size: expected a multiple of 4, the devices that share it (mesh.data 2 x "
        "mesh.fsdp 2), got 6\n"
    )
