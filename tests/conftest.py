"""Settings of every test, and the tiny models that many tests open."""

import contextlib
import dataclasses
import importlib.util
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Most of a test run is compiling, and many tests and commands compile the same programs: pytest's
# processes, the commands they start and later runs share what was compiled.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dopsd_jax" / "tests_xla"
)

import jax
import pytest
from PIL import Image
from skimage import data as photographs

from configs import tiny as tiny_config
from dopsd_jax.core.cli import collect_garbage_seldom
from dopsd_jax.core.log import log
from dopsd_jax.weights.random_flux2 import write_random_flux2
from dopsd_jax.weights.random_pipeline import write_random_pipeline

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Five sixths of the compile time, here and in the commands that tests start: XLA's CPU compiler
# leaves out LLVM's optimisation, lowers fusions without MLIR's passes, and gives LLVM a program in
# one piece. The long checks compile as a user does.
QUICK = ("--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
         "--xla_cpu_parallel_codegen_split_count=1")
DAYS = 14  # after which what was compiled is compiled anew


def forget_old_programs() -> None:
    """Deletes old entries of the cache of compiled programs; others may be doing so as well."""
    for file in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime < time.time() - DAYS * 86400:
                file.unlink()


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        forget_old_programs()
    flags = os.environ.get("XLA_FLAGS", "")
    if "not slow" in config.option.markexpr and QUICK not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK}".strip()


# Longest first, so that both of pytest's processes have something to do until the end.
LONGEST = (
    "test_train", "test_processes", "test_stages", "test_recipes", "test_shipped", "test_baselines",
    "test_mesh", "test_bucket", "test_readme", "test_denoiser", "test_step", "test_plan",
    "test_encode", "test_tasks", "test_continual", "test_paired",
)


def pytest_collection_finish():
    collect_garbage_seldom()


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Directories of a random pipeline in the format of Z-Image-Turbo and of a random Qwen3-VL."""

    pipeline: Path
    vlm: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """The two tiny models, float32, seed 0; shared by all tests, so nothing may be changed."""
    return Tiny(*write_random_pipeline(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def tiny_flux2(tmp_path_factory) -> Path:
    """A random pipeline in the format of FLUX.2-klein, float32; nothing in it may be changed."""
    return write_random_flux2(tmp_path_factory.mktemp("tiny_flux2"))


@pytest.fixture(scope="session")
def two_photos(tmp_path_factory) -> Path:
    """A folder of two real photographs with captions; nothing in it may be changed."""
    directory = tmp_path_factory.mktemp("two_photos")
    for name in ("astronaut", "chelsea"):
        Image.fromarray(getattr(photographs, name)()).save(directory / f"{name}.png")
        (directory / f"{name}.txt").write_text(f"a photo of {name}")
    return directory


@pytest.fixture(scope="session")
def make_short_run(tiny, two_photos):
    """() -> a config of two updates on the tiny models and two photographs."""
    def make():
        c = tiny_config.get_config()
        c.model, c.vlm, c.data = str(tiny.pipeline), str(tiny.vlm), str(two_photos)
        c.buckets, c.text_tokens, c.teacher_tokens = "64x64", 64, 64
        c.vlm_min_pixels = c.vlm_max_pixels = 64 * 64
        c.num_train_steps, c.batch_size, c.sample_every, c.sample_steps = 2, 2, 2, 2
        c.checkpoint_every, c.learning_rate, c.lora.rank = 2, 1e-2, 4
        return c

    return make


@pytest.fixture
def short_run(make_short_run):
    """Such a config, to be changed at will."""
    return make_short_run()


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    # Threads that wait for each other at every operation take ten times as long on shared cores.
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _caplog_sees_the_log_once(monkeypatch):
    # A command that ran in this process before has turned propagation off. Set here, before
    # pytest looks which loggers its handler has to be hung into, or a line would be seen twice.
    monkeypatch.setattr(log, "propagate", True)
