"""Exports sent to a server that answers as the hub does."""

import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from tests.commands import ROOT, environment
from tests.fake_hub import Hub
from tests.finished_run import make_run


@pytest.fixture(scope="module")
def server():
    with Hub({}) as server:
        yield server
        server.shutdown()


def python(server, home, *command, token="hf_writer", **variables):
    env = {k: v for k, v in environment().items() if k not in ("HF_TOKEN", "HF_TOKEN_PATH")}
    token = {"HF_TOKEN": token} if token else {}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
        env=env | token | {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
                           "HF_HUB_DISABLE_TELEMETRY": "1", **variables},
    )


def test_weights_and_card_arrive_and_nothing_else(server, tiny, tmp_path):
    run, out = make_run(tmp_path / "run", tiny.pipeline), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "images").mkdir()
    (out / "images" / "other.png").write_bytes(b"mine")
    done = python(
        server, tmp_path, "-m", "dopsd_jax.export", f"--workdir={run}", "--format=diffusers",
        f"--out={out / 'style.safetensors'}", "--push=org/style", "--private",
        HF_HUB_DISABLE_XET="1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"sent to {server.url}/org/style"
    taken = server.taken["org/style"]
    assert taken == {name: (out / name).read_bytes() for name in taken}
    assert set(taken) == {"README.md", "style.safetensors", "images/learned.png",
                          "images/prompt_1.png", "images/prompt_2.png", "images/prompts.png",
                          "images/unrelated.png"}
    assert server.private == {"org/style"}
    assert list(server.stored.values()) == [taken["style.safetensors"]]  # through LFS
    assert b'load_lora_weights("org/style", weight_name="style.safetensors")' in taken["README.md"]
    assert load_file(out / "style.safetensors")


ASK = """
from pathlib import Path
from huggingface_hub import constants
from dopsd_jax.weights import hub
def ask(repo, files=("style.safetensors",), check=False):
    try:
        if check:
            hub.check_push(repo)
        else:
            print(hub.push(repo, Path({folder!r}), files, private=False))
    except ValueError as e:
        print(str(e).replace(chr(10), " "))
"""


def ask(server, folder, lines, **more):
    done = python(server, folder, "-c", ASK.format(folder=str(folder)) + lines, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def test_a_place_that_is_there_gets_the_new_files(server, tmp_path, monkeypatch):
    """By the library's own way for storage with Xet, where all files are small to the server."""
    monkeypatch.setattr(server, "large", ".none")
    server.taken["org/there"] = {"old.txt": b"old"}
    for name in ("a[1].safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    (url,) = ask(server, tmp_path, "ask('org/there', ['a[1].safetensors'])")
    assert url == f"{server.url}/org/there" and "org/there" not in server.private
    assert server.taken["org/there"] == {"old.txt": b"old", "a[1].safetensors": b"a[1].safetensors"}


def test_what_keeps_it_from_being_sent_is_said_with_what_to_do(server, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(b"x")
    reader, nowhere = ask(server, tmp_path, """
ask("org/new")
constants.ENDPOINT = "http://127.0.0.1:9"
ask("org/new")
""", token="hf_reader")
    assert "the hub answered 403: the token may not write to org/new; use one with" in reader
    assert "the hub at http://127.0.0.1:9 cannot be reached" in nowhere
    *names, wrong = ask(server, tmp_path, """
for name in ("style", "a/b/c", "org/sty le", "-x/y"):
    ask(name, check=True)
ask("org/new")
""", token="hf_unknown")
    assert [n.partition(", got")[0] for n in names] == ["--push: expected OWNER/NAME"] * 4
    assert "the hub answered 401: the token is not valid; log in again with `hf" in wrong
    assert "org/new" not in server.taken


def test_nothing_is_written_where_it_could_not_be_sent(server, tmp_path):
    """Also: no token is found out before the run is looked at."""
    done = python(server, tmp_path, "-m", "dopsd_jax.export", "--workdir=nowhere", "--format=peft",
                  f"--out={tmp_path / 'out'}", "--push=org/new", token="")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "error: --push: expected a token of the hub, found none; log in with `hf auth login`, or "
        "set HF_TOKEN")
    assert not (tmp_path / "out").exists()
