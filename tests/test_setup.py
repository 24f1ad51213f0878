"""launch/setup.sh with an interpreter that only pretends: which Python, which environment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Says what it is when asked with -c, makes an environment that holds a copy of itself, and logs
# what pip is told.
FAKE = """#!/usr/bin/env bash
case "$1 $2" in
  "-c "*) echo "{version} {home}" ;;
  "-m venv") mkdir -p "$3/bin"; [ -z "{broken}" ] || exit 1; cp "$0" "$3/bin/python" ;;
  "-m pip") echo "$*" >> "{log}" ;;
esac
"""


@pytest.fixture
def place(tmp_path):
    """A copy of what setup.sh reads, and a script that sources it."""
    root = tmp_path / "root"
    (root / "launch").mkdir(parents=True)
    for name in ("requirements.txt", "pyproject.toml", "launch/setup.sh"):
        shutil.copy(ROOT / name, root / name)
    (root / "launch" / "try.sh").write_text(
        'set -euo pipefail\nsource "$(dirname "$0")/setup.sh" test\necho ready\n'
    )
    return root


def fake(directory, version, *, home="/opt/a", name="python3", broken=""):
    directory.mkdir(exist_ok=True)
    file = directory / name
    log = directory / "pip.log"
    file.write_text(FAKE.format(version=version, home=home, log=log, broken=broken))
    file.chmod(0o755)
    return file


def start(place, python=None, path=None, **more):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "DOPSD_VENV")}
    env |= {} if python is None else {"PYTHON": str(python)}
    env |= {} if path is None else {"PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "launch/try.sh"], cwd=place, env=env | more, text=True,
                          capture_output=True, check=False)
    assert (done.returncode == 0) == ("ready" in done.stdout), done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_fresh_machine_installs_once(place, tmp_path):
    python = fake(tmp_path / "a", "3.11.7")
    code, output = start(place, path=python.parent)
    assert code == 0 and "installing into .venv" in output, output
    installed = (python.parent / "pip.log").read_text()
    assert "-e .[test]" in installed
    assert start(place, path=python.parent) == (0, "ready\n")
    assert start(place, python) == (0, "ready\n")
    assert (python.parent / "pip.log").read_text() == installed


@pytest.mark.parametrize("version", ["3.11.0", "3.12.4", "3.14.0", "4.0.0"])
def test_new_pythons_are_taken(place, tmp_path, version):
    assert start(place, fake(tmp_path / "a", version))[0] == 0


@pytest.mark.parametrize("version", ["2.7.18", "3.8.10", "3.10.12"])
def test_old_pythons_are_refused_by_name(place, tmp_path, version):
    python = fake(tmp_path / "a", version)
    for code, output in (start(place, python), start(place, path=python.parent)):
        assert code == 1 and f"Python 3.11 or newer is needed, found {version}" in output, output
    assert not (place / ".venv").exists() and not (python.parent / "pip.log").exists()


def test_an_environment_of_an_old_python_is_refused(place, tmp_path):
    old = fake(tmp_path / "a", "3.9.2")
    subprocess.run([old, "-m", "venv", place / ".venv"], check=True)
    code, output = start(place, path=fake(tmp_path / "b", "3.12.4").parent)
    assert code == 1 and "Python 3.11 or newer is needed, found 3.9.2" in output
    assert "delete .venv" in output


@pytest.mark.parametrize("version,home", [("3.12.4", "/opt/a"), ("3.11.7", "/opt/b")])
def test_an_environment_of_another_python_is_refused_and_kept(place, tmp_path, version, home):
    assert start(place, fake(tmp_path / "a", "3.11.7"))[0] == 0
    other = fake(tmp_path / "b", version, home=home)
    code, output = start(place, other)
    assert code == 1, output
    assert f".venv was made by Python 3.11.7 /opt/a, but PYTHON={other} is {version} {home}" \
        in output
    assert (place / ".venv" / "bin" / "python").exists()
    assert start(place, other, DOPSD_VENV=str(tmp_path / "elsewhere"))[0] == 0
    assert start(place, path=other.parent)[0] == 0  # not asked for: the environment stays


def test_an_environment_whose_python_is_gone_is_named(place, tmp_path):
    python = fake(tmp_path / "a", "3.11.7")
    assert start(place, python)[0] == 0
    (place / ".venv" / "bin" / "python").unlink()
    (place / ".venv" / "bin" / "python").symlink_to(tmp_path / "gone")
    code, output = start(place, python)
    assert code == 1 and "the Python in .venv does not run" in output, output


def test_a_python_that_is_not_there_is_named(place, tmp_path):
    code, output = start(place, tmp_path / "no_such_python")
    assert code == 1 and "no_such_python does not run" in output, output


def test_an_environment_that_could_not_be_made_is_not_taken_for_one(place, tmp_path):
    for _ in range(2):
        code, output = start(place, fake(tmp_path / "a", "3.11.7", broken="yes"))
        assert code == 1 and "could not make .venv" in output, output
