"""The child that compiles: stopped once its files are there, and what it says when it fails."""

import sys
import textwrap
import time

import pytest

from dopsd_jax.planning import compiler
from dopsd_jax.planning.chips import GIB, chip_of, count_chips
from tests.planning.test_hlo import REPORT, TEXT

WRITES = f"""
    import pathlib, sys, time
    d = pathlib.Path(sys.argv[1])
    (d / "m.train_step.after_optimizations-memory-usage-report.txt").write_text({REPORT!r})
    (d / "m.train_step.after_optimizations_after_buffer_assignment.txt").write_text({TEXT!r})
"""


def child(script):
    return [sys.executable, "-c", textwrap.dedent(script)]


def test_the_child_is_stopped_once_memory_and_schedule_are_known():
    begin = time.monotonic()
    dump = compiler.compile_in_child(child(WRITES + "\n    time.sleep(600)"), "train_step")
    assert time.monotonic() - begin < 60
    assert dump.memory.total == 3625592320 and dump.text == TEXT and dump.cycles == 0


def test_a_full_build_is_waited_for_and_its_cycles_read():
    script = WRITES + f"""
    time.sleep(2.5)
    (d / {compiler.FINAL!r}).write_text({TEXT!r})
"""
    assert compiler.compile_in_child(child(script), "train_step", full=True).cycles == 120 * 107


@pytest.mark.parametrize("said,needed,available", [
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
     "Used 24.60G of 15.75G hbm. Exceeded hbm capacity by 8.85G.", 24.6, 15.75),
    ("the total memory required for HLO temporaries (16.01G) exceeds available HBM (15.00G)",
     16.01, 15.0),
])
def test_a_program_that_needs_too_much_says_how_much(said, needed, available):
    script = f"import sys; print({said!r}, file=sys.stderr); sys.exit(1)"
    with pytest.raises(compiler.DoesNotFit) as e:
        compiler.compile_in_child(child(script), "train_step")
    assert (e.value.needed, e.value.available) == (needed * GIB, available * GIB)


def test_other_failures_are_told_with_what_was_said():
    with pytest.raises(RuntimeError, match="compiling failed:\n(.*\n)*.*NameError: name 'x'"):
        compiler.compile_in_child(child("x"), "train_step")
    with pytest.raises(RuntimeError, match="wrote no .*another version of libtpu"):
        compiler.compile_in_child(child("pass"), "train_step")
    with pytest.raises(RuntimeError, match="did not answer in time"):
        compiler.compile_in_child(child("import time; time.sleep(60)"), "train_step", timeout=0.5)


def test_topologies_are_read_or_refused():
    assert chip_of("v5e:4x4").kind == "TPU v5 lite" and count_chips("v5p:2x2x4") == 16
    for wrong in ("v5e", "v9:2x2", "v5e:0x4", "v5e:axb", "v5e:²x4", "v5p:4x4", "v6e:2x2x2", ""):
        with pytest.raises(ValueError, match="such as v5e:4x4, v6e:4x4 or v5p:2x2x1, or "):
            chip_of(wrong)
