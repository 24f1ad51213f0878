"""Models by name: from a server on this machine that answers as the hub does, and a cache."""

import shutil
import subprocess
import sys

import pytest

from dopsd_jax.weights import hub, shipped
from tests.commands import ROOT, environment
from tests.fake_hub import COMMIT, Hub


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """The two tiny models, with files beside them that nobody needs."""
    folder, copies = tmp_path_factory.mktemp("hub"), {}
    for repo, path in (("org/tiny", tiny.pipeline), ("org/tiny-vl", tiny.vlm)):
        copies[repo] = folder / path.name
        shutil.copytree(path, copies[repo])
        for name in ("README.md", "assets/picture.png", "flux.safetensors.md", "old/model.bin"):
            (copies[repo] / name).parent.mkdir(exist_ok=True)
            (copies[repo] / name).write_bytes(b"x")
    (copies["org/tiny"] / "everything.safetensors").write_bytes(b"x" * 100)
    (copies["org/tiny-vl"] / "open_clip_model.safetensors").write_bytes(b"x" * 100)
    with Hub(copies) as server:
        yield server
        server.shutdown()


def python(server, cache, *command, **variables):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
        env=environment() | {
            "HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1", **variables,
        },
    )


SAMPLE = ("-m", "dopsd_jax.sample", "--prompt", "a cat", "--num_steps=1", "--height=32",
          "--width=32", "--dtype=float32")


@pytest.fixture(scope="module")
def cache(server, tmp_path_factory):
    """A cache into which `sample` has downloaded the pipeline."""
    cache = tmp_path_factory.mktemp("cache")
    done = python(server, cache, *SAMPLE, "--model=org/tiny", f"--out={cache / 'online'}")
    assert done.returncode == 0, done.stderr
    return cache


def test_only_what_is_read_comes(server, cache, tiny):
    sent = [name.removeprefix("org/tiny/") for name in server.asked
            if name.startswith("org/tiny/")]
    assert len(sent) == len(set(sent))
    assert "everything.safetensors" not in sent and "README.md" not in sent
    assert {"model_index.json", "vae/config.json", "tokenizer/tokenizer.json"} <= set(sent)
    weights = {p.relative_to(tiny.pipeline).as_posix()
               for p in tiny.pipeline.rglob("*.safetensors")}
    assert weights <= set(sent)


def test_what_is_there_is_used_offline_and_draws_the_same(server, cache, tiny):
    """The cache holds links to blobs that lie outside of the snapshot."""
    snapshot = cache / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert (snapshot / "model_index.json").is_symlink()
    before = len(server.asked)
    for name, model in (("offline", "org/tiny"), ("directory", str(tiny.pipeline)),
                        ("commit", f"org/tiny@{COMMIT}")):
        done = python(server, cache, *SAMPLE, f"--model={model}", f"--out={cache / name}",
                      HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
        assert done.returncode == 0, done.stderr
    pictures = [next((cache / name).glob("*.png")).read_bytes()
                for name in ("online", "offline", "directory", "commit")]
    assert len(set(pictures)) == 1 and len(server.asked) == before


ASK = """
from dopsd_jax.weights import hub
for name in {names!r}:
    try:
        print(hub.fetch(name, pipeline=True, weights={weights}))
    except ValueError as e:
        print(str(e).replace(chr(10), " "))
"""


def test_what_cannot_be_had_is_said_with_what_to_do(server, tmp_path):
    names = ["org/gated", "org/none", "org/tiny@v9"]
    done = python(server, tmp_path, "-c", ASK.format(names=names, weights=True))
    gated, none, revision = done.stdout.strip().splitlines()
    assert f"accept the terms at {server.url}/org/gated, then log in with: hf auth login" in gated
    assert "org/none: expected a directory here, or a model on the hub, found neither" in none
    assert "org/tiny@v9: the hub has this model, but no such revision" in revision
    done = python(server, tmp_path, "-c", ASK.format(names=["org/tiny"], weights=True),
                  HF_HUB_OFFLINE="1")
    assert "found neither, and the hub cannot be reached (or HF_HUB_OFFLINE is set)" in done.stdout


def test_configs_come_without_weights_and_a_vlm_lies_flat(server, tmp_path):
    before = len(server.asked)
    done = python(server, tmp_path, "-c", ASK.format(names=["org/tiny"], weights=False))
    assert COMMIT in done.stdout, done.stderr
    sent = server.asked[before:]
    assert sent and not [name for name in sent if name.endswith(".safetensors")]
    before = len(server.asked)
    done = python(server, tmp_path, "-c", ASK.format(names=["org/tiny"], weights=("vae",)))
    assert COMMIT in done.stdout, done.stderr
    weights = [name for name in server.asked[before:] if name.endswith(".safetensors")]
    assert weights == ["org/tiny/vae/diffusion_pytorch_model.safetensors"]
    ask = "from dopsd_jax.weights import shipped; print(shipped.vlm_directory('org/tiny-vl'))"
    done = python(server, tmp_path, "-c", ask)
    assert COMMIT in done.stdout, done.stderr
    flat = [n for n in server.asked if n.startswith("org/tiny-vl/")]
    assert any(n.endswith("model.safetensors") for n in flat)
    assert not [n for n in flat if n.count("/") > 2 or "open_clip" in n]


@pytest.mark.parametrize("text, named", [
    ("Tongyi-MAI/Z-Image-Turbo", True), ("black-forest-labs/FLUX.2-klein-4B@main", True),
    ("org/model@refs/pr/3", True), ("mini", False), ("./org/model", False), ("/org/model", False),
    ("a/b/c", False), ("org/model@", False), ("../model", False), ("gs://a/b", False),
])
def test_which_texts_are_names(text, named):
    assert hub.is_name(text) == named


def test_a_directory_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert str(shipped.pipeline_directory("org/tiny")) == "org/tiny"
