"""The frame of the commands; tests/test_commands.py runs it whole."""

import os

import pytest
from absl import flags

from configs import common
from dopsd_jax.core import cli


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
