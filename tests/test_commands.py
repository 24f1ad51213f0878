"""The commands, given what users get wrong: one plain line, status 1, no traceback."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dopsd_jax import __main__ as dopsd
from tests import commands
from tests.commands import environment

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(tiny, tmp_path):
    """Runs a command in an empty folder and returns its error; {model} and {vlm} are filled in.

    The folder holds README.md, config.py (tiny) and broken ones: syntax.py, imports.py, empty.py.
    """
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "README.md").write_text("mine")
    for name, text in {
        "syntax": "def get_config(:\n", "empty": "\n",
        "imports": "\nimport no_such_module\n\ndef get_config(): ...\n",
        "nothing": "def get_config(): pass\n",
        "key": "from configs.common import base\ndef get_config():\n  c = base()\n  c['x'].y = 1\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    before = sorted(tmp_path.iterdir())

    def run(name, *args):
        args = [str(a).format(model=tiny.pipeline, vlm=tiny.vlm) for a in args]
        done = commands.run(f"dopsd_jax.{name}", *args, cwd=tmp_path)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "reading" not in done.stderr, done.stderr
        assert sorted(tmp_path.iterdir()) == before
        return done.stderr

    return run


TINY = ("--workdir", "w", "--config", "configs/tiny.py")
MODELS = ("--config.model={model}", "--config.vlm={vlm}")


@pytest.mark.parametrize(
    "args,message",
    [((*TINY, "--config.lr=3", "--config.seeed=1", "--config.lora=2"),
      "error: --config.lr: no such key; did you mean learning_rate or lora.rank? see "
      "docs/keys.md\n  --config.seeed: no such key; did you mean seed? see docs/keys.md\n"
      "  --config.lora: no such key; did you mean lora.alpha or lora.factor or lora.kind or "
      "lora.rank or lora.targets? see docs/keys.md\n"),
     ((*TINY, "--config.learning_rate=abc"),
      "could not convert string to float: 'abc'; expected float, such as 0.001\n"),
     ((*TINY, "--config.lora.rank", "4.5"), "'4.5'; expected int, such as 8\n"),
     (("--workdir", "w", "--config", "nowhere.py", "--config.seed=3"),
      "error: --config nowhere.py: no such file; "),
     (("--workdir", "w", "--config=syntax.py"), "error: --config syntax.py, line 1: SyntaxError: "),
     (("--workdir", "w", "--config=imports.py"),
      "--config imports.py, line 2: ModuleNotFoundError: No module named 'no_such_module'\n"),
     (("--workdir", "w", "--config=key.py"), "error: --config key.py, line 4: KeyError: "),
     (("--workdir", "w", "--config=empty.py"), "error: --config empty.py: has no get_config()"),
     (("--workdir", "w", "--config=nothing.py"), "should return a ConfigDict made from "
      "configs.common.base(), it returned NoneType\n"),
     (("--workdir", "w", "--config.seed=3"), "--config.seed needs --config FILE before it\n"),
     (("--workdir", "w"), "error: --config is needed"),
     ((*TINY, *MODELS, "--config.data=gs://x/y.jsonl"),
      "data: expected files of this machine, got gs://x/y.jsonl; copy them here first, "),
     ((*TINY, *MODELS, "--config.data=nothing.parquet"),
      "nothing.parquet', which does not exist; "),
     ((*TINY, "a", "b"), "error: unexpected arguments ['a', 'b']; is a text not quoted?\n"),
     ((*TINY, "--config.seed=1", "--config.seed", "2", "--workdir=v"),
      "error: --workdir takes one value and is given 2: w, v; give it once\n"
      "  --config.seed takes one value and is given 2: 1, 2; give it once\n"),
     (("--workdir=README.md/w", "--config=configs/tiny.py"), "expected a directory for "),
     ((*TINY, "--config.model=README.md", "--config.vlm={vlm}", "--config.data=.",
       "--config.dtype=float12"),
      "error: config:\n  dtype: expected one of ('bfloat16', 'float16', 'float32'), got 'float12'\n"
      "  model: README.md: expected a directory with model_index.json, transformer/, vae/, .., "
      "found a file\n")],
)
def test_train_says_what_is_wrong(command, args, message):
    assert message in command("train", *args)


MODEL = ("--model", "{model}")


@pytest.mark.parametrize(
    "args,message",
    [(("--model", "README.md", "--prompt=a"), "README.md: expected a directory with "),
     (("--model", "https://huggingface.co/org/model", "--prompt=a"),
      "found nothing; a model on the hub is named OWNER/NAME\n"),
     (("--model", "{model}/text_encoder/model.safetensors", "--prompt=a"),
      "found a file; one file of a model is named by transformer_file, beside model\n"),
     ((*MODEL, "--prompt=a", "--out=README.md"), "README.md: expected a directory, found a file\n"),
     ((*MODEL, "--prompt=a", "--dtype=float12"),
      "flag --dtype=float12: value should be one of <bfloat16|float16|float32>\n"),
     ((*MODEL, "--prompt", "x " * 600, "--prompt= ", "--height=40", "--num_steps=0"),
      "expected at most 512 tokens, template included, got 1219; shorten it\n  prompt 1 is empty\n"
      "  image size: expected height and width in positive multiples of 16, got 40x64 (height x "
      "width)\n  num_steps: expected at least 1 denoiser call, got 0\n"),
     ((*MODEL, "--prompt=a", "--height=8192", "--width=64"), "h = 1024 needs 512 positions"),
     ((*MODEL, "--prompt=a", "--lora=nowhere.safetensors"), "nowhere.safetensors: no such file\n"),
     ((*MODEL, "--prompt=a", "--prompt=b", "--out=A", "--out", "B"),
      "error: --out takes one value and is given 2: A, B; give it once\n"),
     ((*MODEL, "--prompt=a", "--lora=A", "--lora", "B:x"),
      "error: B:x: expected PATH or PATH:STRENGTH with a number such as 0.7 for the strength"),
     (("--model", "b" * 5000, "--prompt=a"), "error: model: bbbb"),
     ((*MODEL, "--prompt=a", "--lora", "b" * 5000), "of 5000 bytes, at most 255 are possible; "),
     ((*MODEL, "--prompt=a", "--lora=README.md"), "README.md: truncated or not a safetensors")],
)
def test_sample_says_what_is_wrong_before_it_reads_weights(command, args, message):
    assert message in command("sample", *args)


def test_export_says_what_is_wrong(command):
    to = ("--format=diffusers", "--out=README.md/x.safetensors")
    error = command("export", "--workdir=w", *to)
    assert "README.md: expected a directory, found a file" in error
    error = command("export", "--workdir=w", "--format=diffusers", "--out=x.safetensors")
    assert "w: expected a run's directory with config.json" in error


def test_an_address_that_nothing_opens_says_what_to_install(command):
    """No command may need a network to say so, so the packages are not there for any of them."""
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed, and would look for the bucket")
    for args in (
        ("report", "--workdir=gs://bucket/run"),
        ("export", "--workdir=gs://bucket/run", "--format=diffusers", "--out=x.safetensors"),
        ("train", "--workdir=gs://bucket/run", "--config=configs/tiny.py",
         "--config.model={model}", "--config.vlm={vlm}", "--config.data=photos"),
    ):
        assert "gs://bucket/run" in (error := command(*args)), args
        assert "run `pip install gcsfs`, which comes with the extra dopsd_jax[tpu]" in error


@pytest.mark.parametrize("file,message", [
    ("syntax.py", "syntax.py, line 1: SyntaxError: "),
    ("imports.py", "imports.py, line 2: ModuleNotFoundError: No module named 'no_such_module'\n"),
    ("nowhere.py", "nowhere.py: no such file; "), ("empty.py", "empty.py: has no get_config()"),
    ("README.md", "README.md, line 1: NameError: "),
])
def test_evaluate_says_what_is_wrong_with_the_config_of_its_runs(file, message, tmp_path, command):
    from configs import mini_claim
    from dopsd_jax import evaluate

    config = mini_claim.get_config()
    config.run_config = str(tmp_path / file)
    with pytest.raises(ValueError, match="--config.run_config .*" + re.escape(message.strip())):
        evaluate.evaluate(config, tmp_path / "w")


def test_one_word_lists_all_commands_with_an_example_each():
    package = ROOT / "dopsd_jax"
    commands = {p.stem for p in package.glob("*.py")} - {"__init__", "__main__"}
    assert {*dopsd.COMMANDS} == commands | {"data"}  # which is a package too
    done = subprocess.run([sys.executable, "-m", "dopsd_jax"], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    for name in dopsd.COMMANDS:
        assert re.search(rf"^{name} +[A-Z].*\n    dopsd {name} --", done.stdout, re.M), name
    assert "\\" not in done.stdout


def test_one_word_runs_a_command_as_its_module_does(tmp_path):
    """Config files find `configs` in the folder that it runs in."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    found = []
    for start in (["dopsd_jax", "train"], ["dopsd_jax.train"]):
        done = subprocess.run(
            [sys.executable, "-m", *start, "--config", "configs/tiny.py", "--workdir", "run",
             "--config.model=none"],
            cwd=tmp_path, text=True, capture_output=True, check=False,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
        )
        assert done.returncode == 1
        found.append(done.stderr)
    assert found[0] == found[1] and "none: expected a directory" in found[0]


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """What a real bash offers for a line that is typed up to its end, in a folder with runs/."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "runs").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "dopsd_jax", "completion", "--out", "made/dopsd"], cwd=folder,
        env=environment(), capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    script = """source made/dopsd || exit 3
        [ "$(complete -p dopsd)" = "complete -o bashdefault -F _dopsd dopsd" ] || exit 4
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        _dopsd dopsd "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
        printf '%s\n' "${COMPREPLY[@]}" """

    def ask(line):
        # As bash cuts it, where = is a word of its own.
        words = [w for word in line.split(" ") for w in re.split("(=)", word)]
        if words[-2] == "=" and not words[-1]:
            words.pop()
        done = subprocess.run(["bash", "-c", script, "bash", *words], cwd=folder,
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "command not found" not in done.stderr, done.stderr
        return done.stdout.split()

    return ask


@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="shtab is not installed")
@pytest.mark.parametrize("line, words", [
    ("dopsd tra", "train"), ("dopsd exp", "export"), ("dopsd train --wor", "--workdir"),
    ("dopsd train --config.lora.ra", "--config.lora.rank"),
    ("dopsd data --config=x.py --config.seed 3 --li", "--limit"),
    ("dopsd export --format ", "comfyui comfyui_fused diffusers peft"),
    ("dopsd export --format=", "comfyui comfyui_fused diffusers peft"),
    ("dopsd export --format=pe", "peft"), ("dopsd export --noca", "--nocard"),
    ("dopsd sample --lora a --lora b --transf", "--transformer_file"),
    ("dopsd score --cl", "--clip"), ("dopsd tasks --pro", "--process_id"),
    ("dopsd train --workdir ru", "runs"), ("dopsd train --workdir=ru", "runs"),
    ("dopsd export --formatt", ""),
])
def test_bash_completes_commands_flags_values_paths_and_keys(completed, line, words):
    assert completed(line) == words.split()


@pytest.mark.parametrize("start", [["help", "score"], ["score", "--help"], ["score", "-h"]])
def test_help_has_an_example_and_the_flags_of_a_command_in_groups(start, tmp_path):
    done = commands.run("dopsd_jax", *start, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    example, flags, metrics = (done.stdout.index(x) for x in (
        "    python -m dopsd_jax.score --pictures ", "\nflags:\n  --dino_size: ",
        "\nmetrics:\n  --clip: ",
    ))
    assert example < flags < metrics and "absl" not in done.stdout


def test_help_says_where_keys_of_a_config_are():
    done = commands.run("dopsd_jax.train", "--help")
    assert done.returncode == 0 and " \\\n        --config.model=DIR" in done.stdout
    assert "python -m dopsd_jax.run.keys" in done.stdout and "--coordinator: " in done.stdout


def test_a_flag_that_is_none_gets_the_nearest_flag_or_key(command):
    assert command("train", *TINY, "--seed=3", "--lerning-rate=1", "--xyzzy=1", "--Workdir=x") == (
        "error: --seed: no such flag; did you mean --config.seed? --help lists all\n"
        "  --lerning-rate: no such flag; did you mean --config.learning_rate? --help lists all\n"
        "  --xyzzy: no such flag; --help lists all\n"
        "  --Workdir: no such flag; did you mean --workdir? --help lists all\n"
    )
    assert command("sample", "--promt=a") == (
        "error: --promt: no such flag; did you mean --prompt? --help lists all\n"
    )
    assert command("sample", "--out=x") == (
        "error: --model is needed; --help says what it is\n"
        "  --prompt is needed; --help says what it is\n"
    )


@pytest.mark.parametrize("name, config, missing", [
    ("tasks", "tiny", "carry, tasks"), ("encode", "mini_claim", "recipe, cache"),
    ("evaluate", "tiny", "methods, checkpoints"), ("continual", "tiny", "methods, orders"),
])
def test_a_config_of_another_command_is_refused(command, name, config, missing):
    workdir = () if name == "encode" else ("--workdir", "w")
    error = command(name, "--config", f"configs/{config}.py", *workdir)
    assert error.startswith("error: --config: expected a config of this command, such as configs/")
    assert error.endswith(f"{missing}\n") and len(error.splitlines()) == 1


def test_a_cache_that_cannot_be_a_folder_is_refused_by_its_key(command):
    error = command("encode", *TINY[2:], *MODELS, "--config.data=.", "--config.cache=README.md/x")
    assert "error: cache: " in error and "README.md: expected a directory for" in error


def test_an_unknown_word_gets_the_nearest_one():
    with pytest.raises(SystemExit, match="trian: no such command; did you mean train?"):
        dopsd.main(["trian"])
