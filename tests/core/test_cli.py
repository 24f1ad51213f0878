"""The frame of the commands; tests/test_commands.py runs it whole."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from absl import flags

from configs import common
from dopsd_jax.core import cli

ROOT = Path(__file__).parents[2]


def test_every_key_of_the_config_is_known():
    keys = cli.config_keys(common.base())
    assert keys["seed"] == 30 and keys["lora.rank"] == 64 and "lora" not in keys


def test_a_config_file_may_take_an_argument(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("from configs.common import base\n\ndef get_config(seed):\n    c = base()\n"
                    "    c.seed = int(seed)\n    return c\n")
    assert cli.load_config(f"{file}:7").seed == 7
    with pytest.raises(ValueError, match=r"c.py, line 5: ValueError: invalid literal"):
        cli.load_config(f"{file}:x")
    with pytest.raises(ValueError, match=r"c.py: TypeError: get_config\(\) missing 1 required"):
        cli.load_config(str(file))


@pytest.mark.parametrize("form", ["--config.{}=1", "-config.{}=1", "--noconfig.{}", "--config.{}"])
def test_keys_are_found_in_every_form_of_a_flag(form):
    argv = ["train", "--config=configs/tiny.py", form.format("see_d")]
    with pytest.raises(ValueError, match=r"--config\.see_d: no such key; did you mean seed\?"):
        cli.check_config_flags(argv)
    cli.check_config_flags(["train", "--config=configs/tiny.py", form.format("seed")])


OTHER = """
import sys
from absl import flags
from ml_collections import config_flags

seen = []

def define_flags():
    config_flags.DEFINE_config_file("config", None, "A config.", lock_config=True)
    flags.DEFINE_string("out", None, "Where to.", required=True)

def main():
    seen.append((flags.FLAGS.out, flags.FLAGS.config.seed, sys.argv))
    if flags.FLAGS.out == "b":
        raise ValueError("refused")
"""


def test_a_command_runs_another_one_with_flags_of_its_own(capsys, monkeypatch):
    module = types.ModuleType("dopsd_jax.other")
    exec(OTHER, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    argv = ["--config=configs/tiny.py", "--config.seed=7", "--out"]
    with cli.flags_of_its_own("outer"):  # of pytest, none that would be missed
        mine = flags.Flag(flags.ArgumentParser(), None, "out", "mine", "Where to.")
        flags.DEFINE_flag(mine, module_name="dopsd_jax.outer")
        before, given = set(flags.FLAGS), sys.argv
        cli.run_module(module.__name__, *argv, "a folder")
        with pytest.raises(ValueError, match="refused"):
            cli.run_module(module.__name__, *argv, "b")
        with pytest.raises(SystemExit, match="--nowhere: no such flag"):
            cli.run_module(module.__name__, *argv, "c", "--nowhere=1")
        assert set(flags.FLAGS) == before and flags.FLAGS["out"] is mine and sys.argv is given
    assert "out" not in flags.FLAGS
    assert module.seen == [(out, 7, [module.__name__, *argv, out]) for out in ("a folder", "b")]
    shown = capsys.readouterr().out
    assert f"$ python -m dopsd_jax.other {' '.join(argv)} 'a folder'\n" in shown


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    def end(guarded, flags_parser):
        guarded(["train"])

    monkeypatch.setattr(cli.app, "run", end)

    def broken(error):
        def main():
            raise error
        return main

    with pytest.raises(SystemExit, match="error: no such thing"):
        cli.run_command(broken(ValueError("no such thing")))
    with pytest.raises(SystemExit, match="error: stopped"):
        cli.run_command(broken(RuntimeError("stopped")), errors=(RuntimeError,))
    for error in (RuntimeError("x"), TypeError("x"), KeyError("x"), AttributeError("x")):
        with pytest.raises(type(error)):
            cli.run_command(broken(error))


def test_a_directory_must_be_possible(tmp_path):
    cli.check_directory(tmp_path)
    cli.check_directory(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file: expected a directory, found a file"):
        cli.check_directory(tmp_path / "file")
    with pytest.raises(ValueError, match=r"file: expected a directory for .*file/a/b, found"):
        cli.check_directory(tmp_path / "file" / "a" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link: expected a directory, found a link to nothing"):
        cli.check_directory(tmp_path / "link")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_must_be_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="no permission to write"):
        cli.check_directory(tmp_path / "a")


def test_importing_the_frame_defines_no_flag():
    assert "config" not in flags.FLAGS


def flags_of_all_kinds():
    values = flags.FlagValues()
    flags.DEFINE_string("lora", None, "", flag_values=values, short_name="l")
    flags.DEFINE_integer("seed", 0, "", flag_values=values)
    flags.DEFINE_boolean("ema", False, "", flag_values=values)
    flags.DEFINE_multi_string("prompt", None, "", flag_values=values)
    return values


@pytest.mark.parametrize("args,message", [
    (["--lora", "A", "--lora", "B"], "--lora takes one value and is given 2: A, B; give it once"),
    (["--lora=A", "-lora=A"], "--lora takes one value and is given 2: A, A"),
    (["-l", "A", "--lora=B"], "--lora takes one value and is given 2: A, B"),
    (["--seed", "-1", "--prompt=x", "--seed=2"], "--seed takes one value and is given 2: -1, 2"),
    (["--ema", "--noema"], "--ema takes one value and is given 2: true, false"),
    (["--seed=1", "--seed=2", "--lora=", "--lora=B"], "--seed .*once\n  --lora .*given 2: , B"),
])
def test_a_flag_of_one_value_is_given_once(args, message):
    with pytest.raises(ValueError, match=message):
        cli.check_given_once(["sample", *args], flags_of_all_kinds())


@pytest.mark.parametrize("args", [
    ["--prompt", "--lora", "--prompt=b", "--lora", "--lora"], ["--lora=A", "--", "--lora=B"],
    ["--lora", "A", "word", "--lora", "B"], ["--ema", "--seed", "1"], [],
])
def test_what_only_looks_like_a_flag_given_twice_is_none(args):
    cli.check_given_once(["sample", *args], flags_of_all_kinds())


COMMANDS = sorted(
    str(file.relative_to(ROOT).with_suffix("")).replace(os.sep, ".").removesuffix(".__main__")
    for file in (ROOT / "dopsd_jax").rglob("*.py")
    if "cli.run_command(main" in file.read_text()
)


def test_every_flag_of_every_command_is_given_once():
    """All commands with a stand-in for `run_command`, which gives each of their flags twice."""
    script = """
import runpy, sys
from absl import flags
from dopsd_jax.core import cli

values = flags.FLAGS
before = set(values)

def give_all_twice(main, **options):
    for name in set(values) - before:
        single = not isinstance(values[name], flags.MultiFlag)
        try:
            cli.check_given_once(["x", f"--{name}=A", f"--{name}", "B"], values)
            cli.check_given_once(["x", f"--{name}", f"--no{name}"], values)
        except ValueError as e:
            assert single and f"--{values[name].name} takes one value and is given 2: " in str(e), e
        else:
            assert not single, name

cli.run_command = give_all_twice
for command in sys.argv[1:]:
    runpy.run_module(command, run_name="__main__")
    made = set(values) - before
    print(command, len(made))
    for name in made:
        if name in values:
            delattr(values, name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *COMMANDS], cwd=ROOT, capture_output=True, text=True,
        check=False, env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert list(found) == COMMANDS and len(COMMANDS) > 15
    assert int(found["dopsd_jax.sample"]) >= 10 and int(found["dopsd_jax.train"]) >= 5
