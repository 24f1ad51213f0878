"""What a plan makes of the compiler's answers, and how the command tells it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from configs import z_image_turbo_full, z_image_turbo_lora
from dopsd_jax import plan
from dopsd_jax.core import trees
from dopsd_jax.planning import compiler, hlo, lowering
from dopsd_jax.planning.chips import CHIPS, GIB
from dopsd_jax.weights.shapes import transformer_shapes
from tests import commands
from tests.planning.test_hlo import REPORT, TEXT

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fake_compiler(monkeypatch):
    """Answers every compile with a small dump, and notes what was asked."""
    asked = []

    def answer(command, module, *, full=False):
        asked.append((command, module, full))
        return compiler.Dump(TEXT, hlo.parse_memory(REPORT), 1.0, 3 * 10**9 if full else 0)

    monkeypatch.setattr(compiler, "compile_in_child", answer)
    monkeypatch.setattr(compiler, "has_tpu_compiler", lambda: True)
    return asked


def test_a_plan_adds_up(fake_compiler):
    config = z_image_turbo_lora.get_config()
    p = plan.plan(config, "v5e:4x4")
    assert p.fits and p.chips == 16 and p.batch == 1 and p.total == 3625592320
    denoiser = lowering.denoiser_of(plan.with_remat(config, p.remat))
    base = trees.count(transformer_shapes(denoiser.network))
    assert 2 * base / 16 < p.weights < 2.05 * base / 16
    lora = 158_760_960  # student, teacher and two moments, float32
    assert 16 * lora / 16 <= p.state < 16.5 * lora / 16
    assert p.moved("all-gather") == 120 * 2 * (3840**2 + 256 * 15360)
    assert p.moved("all-gather", exposed=True) == 120 * 2 * 256 * 15360
    chip = CHIPS["v5e"]
    linear = (p.flops.computed - p.flops.attention) / (chip.peak * chip.linear)
    assert p.compute_seconds == linear + p.flops.attention / (chip.peak * chip.attention)
    assert p.seconds == pytest.approx(p.compute_seconds + p.exposed_seconds)
    assert p.mfu == pytest.approx(p.flops.useful / p.seconds / chip.peak)
    assert fake_compiler[0][1:] == ("train_step", False)


def test_the_compilers_cycles_take_the_place_of_the_share_of_peak(fake_compiler):
    p = plan.plan(z_image_turbo_lora.get_config(), "v5e:4x4", full=True)
    attention = p.flops.attention / (CHIPS["v5e"].peak * CHIPS["v5e"].attention)
    assert p.compute_seconds == pytest.approx(2.0 + attention)
    assert "rests on: the compiler's own cycles" in "\n".join(plan.rests_on(p))


def test_full_fine_tuning_counts_bytes_by_dtype(fake_compiler):
    config = z_image_turbo_full.get_config()
    wide = plan.plan(config, "v5e:4x4").state
    config.moments_dtype = config.ema_dtype = "bfloat16"
    narrow = plan.plan(config, "v5e:4x4").state
    assert wide / narrow == pytest.approx(16 / 10, rel=1e-3)
    assert plan.plan(config, "v5e:4x4").weights == 0


def test_the_report_says_what_was_asked_for(fake_compiler):
    config = z_image_turbo_lora.get_config()
    text = plan.report(config, plan.plan(config, "v5e:4x4", batch=2))
    for part in ("v5e:4x4: 16 chips, 2 pictures per update and chip, remat activations",
                 "FITS: 3.38 of 15.75 GiB", "trained state", "0.99 GiB  2xs32[1], 5xbf16[30,1",
                 "all-gather", "up to 11 (one per bucket", "teacher forward", "images/s",
                 "model FLOP utilisation", "hours for 2000 steps", "bound by compute"):
        assert part in text, part


def test_all_phases_are_compiled_each_by_its_own_program(fake_compiler, monkeypatch):
    config = z_image_turbo_lora.get_config()
    p = plan.plan(config, "v5e:1x1", batch=1, all_phases=True)
    assert [module for _, module, _ in fake_compiler] == [
        "train_step", "_image_features", "sample_trajectory", "_decode"
    ]
    assert [phase.name for phase in p.phases] == ["vlm", "train", "draw", "decode"]
    assert {phase.program for phase in p.phases} == {p.total}
    assert p.peak.name == "decode" and p.needed == p.peak.total > 14 * GIB + p.total
    assert not p.fits and p.total < p.limit  # the step alone would
    text = plan.report(config, p)
    assert f"DOES NOT FIT: needs {p.needed / GIB:.2f} GiB" in text
    assert "most where the run is to decode pictures" in text and "phases of the run:" in text
    config.base_dtype = "int8"
    assert plan.plan(config, "v5e:1x1", batch=1, all_phases=True).fits

    answer = compiler.compile_in_child

    def draws_too_much(command, module, *, full=False):
        if module == "sample_trajectory":
            raise compiler.DoesNotFit("no", None, None)
        return answer(command, module, full=full)

    monkeypatch.setattr(compiler, "compile_in_child", draws_too_much)
    p = plan.plan(config, "v5e:1x1", batch=1, all_phases=True)
    assert p.peak.name == "draw" and not p.fits
    assert "DOES NOT FIT: needs more, a chip has" in plan.report(config, p)


def test_auto_leaves_room_for_what_lies_beside_the_step(monkeypatch, fake_compiler):
    asked = []

    def answer(command, module, *, full=False):
        policy = json.loads(Path(command[3]).read_text())["config"]["remat"]
        asked.append(policy)
        total = {"activations": 14.4, "dots": 14.2}.get(policy, 5) * GIB  # 14.49 may be taken
        return compiler.Dump(TEXT, hlo.Memory(int(total), []), 1.0)

    monkeypatch.setattr(compiler, "compile_in_child", answer)
    config = z_image_turbo_lora.get_config()
    assert plan.plan(config, "v5e:1x1", batch=1).remat == "activations"
    assert plan.plan(config, "v5e:1x1", batch=1, all_phases=True).remat == "dots"


def test_auto_goes_from_policy_to_policy_until_one_fits(monkeypatch):
    needs = {"activations": 50, "dots": 24, "linears": 16, "matmuls": 14, "attention": 5, "full": 3}
    asked = []

    def answer(command, module, *, full=False):
        policy = json.loads(Path(command[3]).read_text())["config"]["remat"]
        asked.append(policy)
        if needs[policy] > 15.75:
            raise compiler.DoesNotFit("no", needs[policy] * GIB, 15.75 * GIB)
        return compiler.Dump(TEXT, hlo.parse_memory(REPORT), 1.0)

    monkeypatch.setattr(compiler, "compile_in_child", answer)
    monkeypatch.setattr(compiler, "has_tpu_compiler", lambda: True)
    config = z_image_turbo_lora.get_config()
    p = plan.plan(config, "v5e:4x4")
    assert p.fits and p.remat == "matmuls"
    assert asked == ["activations", "dots", "linears", "matmuls"]
    assert config.remat == "auto"
    needs |= dict.fromkeys(needs, 20)
    p = plan.plan(config, "v5e:4x4")
    assert not p.fits and p.remat == "full"


def test_chips_that_share_a_picture_share_its_work(fake_compiler):
    config = z_image_turbo_lora.get_config()
    alone = plan.plan(config, "v5e:2x2")
    config.mesh.tensor = 2
    for batch, share in ((0, 1), (1, 0.5)):
        p = plan.plan(config, "v5e:2x2", batch=batch)
        assert p.batch == share
        assert p.compute_seconds == pytest.approx(share * alone.compute_seconds)
    assert p.images_per_second == pytest.approx(2 / p.seconds)


def test_a_batch_that_accumulation_does_not_divide_is_refused(fake_compiler):
    config = z_image_turbo_lora.get_config()
    config.accumulation = 4
    assert plan.plan(config, "v5e:2x2").batch == 4
    with pytest.raises(ValueError, match="--batch: expected a multiple of accumulation = 4, got 6"):
        plan.plan(config, "v5e:2x2", batch=6)


def test_what_does_not_fit_says_by_how_much(fake_compiler, monkeypatch):
    def too_much(*_, **__):
        raise compiler.DoesNotFit("no", 24.6 * GIB, 15.75 * GIB)

    monkeypatch.setattr(compiler, "compile_in_child", too_much)
    config = z_image_turbo_lora.get_config()
    p = plan.plan(config, "v5e:4x4")
    assert not p.fits
    assert "DOES NOT FIT: needs 24.60 GiB, a chip has 15.75 GiB" in plan.report(config, p)
    assert "24.60  15.75 does not fit" in plan.table([p])


def test_a_sweep_puts_the_best_first_and_what_does_not_fit_last(fake_compiler, monkeypatch):
    plans = plan.sweep(z_image_turbo_lora.get_config(), ["v5e:4x4", "v5p:2x2x1"])
    assert len(plans) == len(fake_compiler) == 2 * 3 * 4
    assert [p.mfu for p in plans] == sorted((p.mfu for p in plans), reverse=True)
    assert {p.remat for p in plans} == set(plan.SWEEP_REMAT)
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=GIB))
    plans = plan.sweep(z_image_turbo_lora.get_config(), ["v5e:4x4", "v5p:2x2x1"])
    assert [p.fits for p in plans] == [True] * 12 + [False] * 12


def run(*args):
    return commands.run("dopsd_jax.plan", *args)


@pytest.mark.parametrize("arguments,message", [
    (["--topology=v9:4x4"], "topology: expected a generation of v5e"),
    (["--topology=v5e:1000x1000"], "at most 16384 chips"),
    (["--topology=v5p:4x4"], "or v5p:2x2x1, or one card of h100, "),
    (["--topology=v5e:4x4", "--config.num_steps=0"], "num_steps: expected 1 to 1000"),
    (["--sweep"], "--sweep: expected --topology"), (["--full"], "--full: expected --topology"),
    (["--topology=v5e:4x4", "--sweep", "--batch=2"], "neither --batch nor --full"),
    (["--fit=48"], "--fit: expected 24, 16, 12 for a card of so many GB"),
], ids=str)
def test_wrong_input_is_one_plain_line(arguments, message):
    done = run("--config", "configs/z_image_turbo_lora.py", *arguments)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_topology_that_the_compiler_refuses_is_told(monkeypatch, fake_compiler):
    def refuse(*_, **__):
        raise RuntimeError("Topology layout is not divisible")

    monkeypatch.setattr(compiler, "compile_in_child", refuse)
    with pytest.raises(ValueError, match="v5e:3x5: the TPU compiler gave up; .*\n.*divisible"):
        plan.plan(z_image_turbo_lora.get_config(), "v5e:3x5")


def test_this_machine_is_planned_for_without_a_topology(tiny):
    done = run("--config", "configs/tiny.py", f"--config.model={tiny.pipeline}",
               f"--config.vlm={tiny.vlm}", "--config.remat=full", "--phases")
    assert done.returncode == 0, done.stderr
    assert "1 x cpu, 2 pictures per device" in done.stdout and "GiB per device" in done.stdout
    told = re.findall(r"^  (.*?) +([\d.]+) GiB: program", done.stdout, re.M)
    assert [name for name, _ in told] == [
        "encode captions beside pictures", "train", "draw pictures", "decode pictures"
    ]
    assert max(float(size) for _, size in told) == float(
        re.search(r"^([\d.]+) GiB per device", done.stdout, re.M)[1]
    )
    assert "FLOPs per picture" in done.stdout
