"""The bench's table and order, without measuring; one real run on a small size: slow."""

import json
import subprocess
import sys

import pytest

from dopsd_jax.bench import __main__ as bench
from dopsd_jax.bench.case import MODELS, Case, Measured
from dopsd_jax.bench.table import Result, as_markdown, useful_flops, utilisation

SMALL = Case("small", 64, 1)


def measured(seconds, device="NVIDIA H100 80GB HBM3"):
    return Measured(30.0, seconds, 1.5 * seconds, 12 * 2**30, 0.5, device)


def test_flops_grow_with_the_batch_and_are_those_of_the_published_size():
    one = Case("z-image", 1024, 1, student_tokens=512, teacher_tokens=512)
    dim, mlp, text, image, rank = 3840, 10240, 512, 4096, 64
    linears = 4 * dim * dim + 3 * dim * mlp
    low_rank = rank * (4 * 2 * dim + 3 * (dim + mlp))
    sequences = [text + image] * 30 + [image] * 2 + [text] * 2  # a layer each
    attention = sum(4 * n * n * dim for n in sequences)
    base, lora = (sum(2 * n * size for n in sequences) for size in (linears, low_rank))
    forward, backward = base + lora + attention, base + 2 * lora + 2 * attention
    assert useful_flops(one) == pytest.approx(4 * (2 * forward + backward), rel=0.01)
    two = Case("z-image", 1024, 2, student_tokens=512, teacher_tokens=512)
    assert useful_flops(two) == 2 * useful_flops(one)


def test_utilisation_needs_a_device_whose_peak_is_known():
    assert utilisation(SMALL, measured(2.0)) == pytest.approx(useful_flops(SMALL) / 2 / 989e12)
    assert utilisation(SMALL, measured(2.0, "cpu")) is None


def test_a_row_per_measurement_and_the_ratio_to_torch_on_the_same_case():
    larger = Case("small", 64, 2)
    text = as_markdown([
        Result("dopsd_jax", SMALL, measured(0.5)), Result("torch", SMALL, measured(1.0)),
        Result("dopsd_jax", larger, "out of memory"),
    ])
    rows = [line for line in text.splitlines() if line.startswith("| 64")]
    assert len({row.count("|") for row in rows}) == 1 and "H100" in text
    assert "| 0.500 | 0.750 | 2 | 2.00 | 12.0 |" in rows[0] and "| 1.00 |" in rows[1]
    assert rows[2].startswith("| 64 | 2 | 128, 512 | dopsd_jax | full | out of memory |")


def test_the_batch_doubles_while_it_fits_and_torch_gets_the_largest(tmp_path, monkeypatch):
    asked = []

    def child(program, case, seconds, cache):
        asked.append((program, case.side, case.batch, case.remat))
        fits = case.batch <= (4 if case.remat == "full" else 2)
        return measured({"linears": 1.2, "matmuls": 1.0}.get(case.remat, 1.5)) if fits else (
            "out of memory")

    monkeypatch.setattr(bench, "_child", child)
    run = bench.Bench(tmp_path, 1000)
    run.everything([64, 32], SMALL, ["linears", "matmuls", "full"])
    assert asked[:5] == [
        *(("dopsd_jax", 64, 1, remat) for remat in ("linears", "matmuls", "full")),
        ("torch", 64, 1, "matmuls"), (bench.COMPILED, 64, 1, "matmuls"),
    ]
    assert asked[5:10] == [
        ("dopsd_jax", 32, 1, "matmuls"), ("torch", 32, 1, "matmuls"),
        ("dopsd_jax", 64, 1, "matmuls"), ("torch", 64, 1, "matmuls"),
        (bench.AGAIN, 64, 1, "matmuls"),
    ]
    lengths = [(r.case.student_tokens, r.case.teacher_tokens) for r in run.results]
    assert lengths[7:10] == [bench.LENGTHS] * 2 + [(128, 512)]
    larger = [("matmuls", 2), ("matmuls", 4), ("full", 4), ("full", 8)]
    assert asked[10:15] == [("dopsd_jax", 64, b, remat) for remat, b in larger] + [
        ("torch", 64, 4, "full")]
    assert len(json.loads((tmp_path / "bench.json").read_text())) == len(asked)
    assert (tmp_path / "bench.md").read_text() == as_markdown(run.results)


def test_other_lengths_are_another_case():
    longer = Case("small", 64, 1, student_tokens=512)
    text = as_markdown([
        Result("dopsd_jax", longer, measured(0.5)), Result("torch", SMALL, measured(1.0)),
    ])
    assert "| 512, 512 | dopsd_jax | full | 0.500 | 0.750 | 2 |  |" in text


def test_quantised_bases_are_measured_with_the_fastest_policy(tmp_path, monkeypatch):
    seconds = {"full": 1.0, "linears": 2.0}
    monkeypatch.setattr(bench, "_child", lambda program, case, *_: measured(seconds[case.remat]))
    run = bench.Bench(tmp_path, 1000)
    run.everything([64], SMALL, ["linears", "full"], ["int8", "nf4"])
    quantised = [r for r in run.results if r.case.base_dtype != "dtype"]
    assert [(r.case.base_dtype, r.case.remat, r.case.batch) for r in quantised] == [
        ("int8", "full", 1), ("nf4", "full", 1)]
    assert "| 64 | 1 | 128, 512 | dopsd_jax, int8 base | full |" in as_markdown(run.results)


def test_what_a_child_cannot_do_is_told(tmp_path, monkeypatch):
    wrong = bench._child("dopsd_jax", Case("no_such", 64, 1), 100, tmp_path)
    assert wrong.startswith("failed: KeyError: 'no_such'")
    assert bench._child("dopsd_jax", SMALL, 0.01, tmp_path) == "no time left"
    monkeypatch.setitem(bench.MODULES, "full", "no_such_module")
    assert bench._child("full", SMALL, 100, tmp_path).startswith("failed: ")


@pytest.mark.slow
def test_both_programs_run_on_a_small_size(tmp_path):
    assert "small" in MODELS
    done = subprocess.run(
        [sys.executable, "-m", "dopsd_jax.bench", "--model", "small", "--sides", "32", "--updates",
         "1", "--student_tokens", "32", "--teacher_tokens", "32", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())
    found = {r["program"] for r in rows if isinstance(r["found"], dict)}
    assert {"dopsd_jax", "dopsd_jax, second start", "torch"} <= found
