"""Plans for GPUs that are not there: what is asked of the compiler, and what is said of it."""

import dataclasses
import json
import types

import pytest

from configs import z_image_turbo_lora
from dopsd_jax import plan
from dopsd_jax.core import cli, sharding
from dopsd_jax.core.memory import memory_of
from dopsd_jax.planning import compiler, hlo
from dopsd_jax.planning.chips import CHIPS, GIB, chip_of, count_chips
from dopsd_jax.planning.gpus import GPUS
from tests.planning.test_compiler import child
from tests.planning.test_hlo import TEXT


def writes(**counted):
    return f"""
    import json, os, pathlib, sys
    d = pathlib.Path(sys.argv[1])
    (d / {compiler.COUNTED!r}).write_text({json.dumps(counted)!r})
    (d / {compiler.FINAL!r}).write_text(os.environ["XLA_FLAGS"])
"""


def test_the_child_is_waited_for_and_what_it_counted_added_up():
    found = compiler.compile_for_gpu(child(writes(arguments=7, temporaries=5, aliased=-2)))
    assert found.memory.total == 10 and found.text == "--xla_gpu_autotune_level=0"


def test_a_child_that_fails_is_told_with_its_words():
    with pytest.raises(RuntimeError, match="no such card"):
        compiler.compile_for_gpu(child("raise SystemExit('no such card')"))


def test_what_takes_the_place_of_old_arrays_is_not_counted_twice():
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=8, temp_size_in_bytes=4, output_size_in_bytes=3,
        alias_size_in_bytes=3,
    )
    compiled = types.SimpleNamespace(memory_analysis=lambda: analysis)
    assert sum(memory_of(compiled).values()) == 12


@pytest.mark.parametrize("name", sorted(GPUS))
def test_a_card_is_one_chip_with_the_memory_that_commands_take(name):
    chip, gpu = chip_of(name), GPUS[name]
    assert count_chips(name) == 1 and chip.kind == gpu.name
    assert chip.memory == float(cli.MEM_FRACTION) * gpu.memory
    assert f"device_memory_size: {gpu.memory}\n" in chip.target
    assert chip.target.count("{") == chip.target.count("}")


def test_a_card_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="or one card of h100, h200, .* got 'h101'"):
        chip_of("h101")


@pytest.fixture
def config():
    config = z_image_turbo_lora.get_config()
    config.remat = "matmuls"
    return config


def test_a_plan_says_what_fits_a_card_and_what_its_time_rests_on(config, monkeypatch):
    asked = []

    def answer(command):
        with open(command[-1]) as file:
            asked.append(json.load(file))
        return compiler.Dump(TEXT, hlo.Memory(20 * GIB, []), 1.0)

    monkeypatch.setattr(compiler, "has_gpu_compiler", lambda: True)
    monkeypatch.setattr(compiler, "has_tpu_compiler", lambda: False)
    monkeypatch.setattr(compiler, "compile_for_gpu", answer)
    p = plan.plan(config, "4090")
    assert p.fits and p.chips == 1 and asked[0]["topology"] == "4090"
    chip = CHIPS["4090"]
    attention = p.batch * p.flops.attention
    linear = (p.batch * p.flops.computed - attention) / (chip.peak * chip.linear)
    assert p.compute_seconds == linear + attention / (chip.peak * chip.attention)
    text = plan.report(config, p)
    assert "FITS: 20.00 of 22.07 GiB" in text and "measured on an H100, assumed of this" in text
    monkeypatch.setitem(CHIPS, "4090", dataclasses.replace(chip, memory=19 * GIB))
    assert not plan.plan(config, "4090").fits


def test_without_the_plugin_it_is_said_how_to_get_it(config, monkeypatch):
    monkeypatch.setattr(compiler, "has_gpu_compiler", lambda: False)
    with pytest.raises(ValueError, match=r"CUDA plugin.*pip install -e '\.\[cuda\]'"):
        plan.plan(config, "h100")


def test_xla_is_told_not_to_merge_products_on_a_gpu_alone():
    def mesh(platform):
        device = types.SimpleNamespace(platform=platform, device_kind=platform)
        return types.SimpleNamespace(devices=types.SimpleNamespace(flat=[device]))

    assert sharding.compiler_options(mesh("gpu")) == {"xla_gpu_dot_merger_threshold_mb": 0}
    assert sharding.compiler_options(mesh("cpu")) is None
