"""Command: the mini model's whole recipe, from shipped emoji to the files that are shipped.

    python -m dopsd_jax.mini.make --out runs/mini                              # CPU, hours
    python -m dopsd_jax.mini.make --out runs/mini --budget gpu --minutes 9     # one GPU

Draws the world, then trains base, the distilled model and the judge, each in a folder of its own,
on the latents of the VAE in the package, or of a new one with --vae train. Every part continues
where it was stopped, and what is finished is not done again. With --minutes the stages share what
time is left after the world was drawn, and each ends well in its share of it: its rate falls to 0
first. While the world is drawn, the programs of all stages are compiled, on a world of the same
size with nothing in it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs.mini import base, judge, turbo, vae
from dopsd_jax.core import cli
from dopsd_jax.core.log import log
from dopsd_jax.mini import build, model, ship, stages
from dopsd_jax.mini.labels import WORLD
from dopsd_jax.mini.styles import SIZE
from dopsd_jax.mini.world import draw_scene
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.shipped import MINI_VAE

FLAGS = flags.FLAGS
# Stage -> its config, and the share of the time that it takes where the time is limited.
STAGES = {"vae": (vae, 0.14), "base": (base, 0.58), "turbo": (turbo, 0.22), "judge": (judge, 0.06)}
# Budget -> rows of every part of the world.
WORLDS = {
    "cpu": {"scenes": 60_000, "pairs": 40_000, "judge": 30_000, "judge_test": 6_000},
    "gpu": {"scenes": 100_000, "pairs": 60_000, "judge": 40_000, "judge_test": 6_000},
    "tiny": {"scenes": 200, "pairs": 200, "judge": 200, "judge_test": 200},  # to try the command
}
# Budget -> keys of a stage's config that differ from configs/mini. A GPU is idle in small batches.
CHANGES: dict[str, dict[str, dict]] = {
    "cpu": {},
    "gpu": {
        "vae": {"batch_size": 128, "num_train_steps": 20_000, "optimizer.decay_steps": 6_000},
        "base": {"batch_size": 256, "num_train_steps": 40_000, "optimizer.decay_steps": 20_000,
                 "optimizer.learning_rate": 3e-3},
        "turbo": {"batch_size": 128, "num_train_steps": 10_000, "optimizer.decay_steps": 4_000},
        "judge": {"batch_size": 256, "num_train_steps": 10_000, "optimizer.decay_steps": 5_000},
    },
    "tiny": {key: {"batch_size": 6, "num_train_steps": 60, "sample_every": 60} for key in STAGES},
}
REHEARSAL = 3  # updates of every stage on the blank world


def blank_world(out: Path, captions: list[str], counts: dict[str, int]) -> None:
    """A world of the same shapes whose files take no room: nearly all zeros, sparse.

    Args:
        out: Its directory.
        captions: Some as a world has them, repeated as often as needed.
        counts: Rows of every part.
    """
    for kind, rows in counts.items():
        folder = out / kind
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {
            "pixels": ((SIZE, SIZE, 3), np.uint8),
            "concepts": ((len(WORLD.concepts),), bool), "counts": ((), np.int32),
            "middles": ((2,), np.float32),
        }
        if kind in ("scenes", "pairs"):
            shapes["placements"] = ((build.CELLS, build.CELLS, 7), np.float16)
        if kind == "pairs":
            shapes["references"] = shapes["pixels"]
        for name, (shape, dtype) in shapes.items():
            np.lib.format.open_memmap(
                folder / f"{name}.npy", "w+", dtype=dtype, shape=(rows, *shape)
            ).flush()
        # Some of every style: pictures along the way show held-out ones too.
        np.save(folder / "styles.npy", np.arange(rows, dtype=np.int32) % len(WORLD.styles))
        told = [captions[i % len(captions)] for i in range(rows)]
        (folder / "captions.json").write_text(json.dumps(told))


def config_of(stage: str, budget: str, world: Path, start: Path) -> ConfigDict:
    """The config of a stage that starts from the models in a folder."""
    config = STAGES[stage][0].get_config()
    config.update_from_flattened_dict(CHANGES[budget].get(stage, {}))
    config.data = str(world)
    config.model, config.vlm = str(start / model.PIPELINE), str(start / model.VLM)
    return config


def train(
    out: Path, world: Path, budget: str, minutes: float, updates: int = 0, *,
    vae: Path | None = None,
) -> None:
    """All stages, each from the one before; `updates` of each alone, if given.

    Args:
        out: Holds a folder for every stage.
        world: From `build`, or blank.
        budget: A key of CHANGES.
        minutes: For all of it; 0: no limit.
        updates: For trying it out.
        vae: Folder of a trained VAE, in place of that stage; None trains one.
    """
    if not (out / "blank").exists():
        model.write_blank(world, out / "blank")
    chosen = dict(STAGES)
    if vae is not None:
        shutil.copytree(vae, out / "blank" / model.PIPELINE / "vae", dirs_exist_ok=True)
        del chosen["vae"]
    end, left = time.monotonic() + 60 * minutes, sum(share for _, share in chosen.values())
    before = out / "blank"
    for stage, (_, share) in chosen.items():
        config = config_of(stage, budget, world, out / "blank" if stage == "judge" else before)
        if updates:
            config.num_train_steps = config.sample_every = config.checkpoint_every = updates
            config.optimizer.decay_steps = 1
        if minutes:
            # Of what is left, so that what one stage saves or overdraws is shared by the others.
            config.seconds = max((end - time.monotonic()) * share / left, 1.0)
            log.info("%s: %.0f seconds", stage, config.seconds)
        stages.train(config, out / stage)
        left -= share
        before = out / stage


def draw_world(out: Path, counts: dict[str, int]) -> subprocess.Popen:
    """Starts to draw the world on all cores."""
    return subprocess.Popen([
        sys.executable, "-m", "dopsd_jax.mini.build", "--out", str(out),
        *(f"--{kind}={rows}" for kind, rows in counts.items()),
    ])


def make(out: Path, budget: str, minutes: float, vae: Path | None = None) -> None:
    """Everything up to the trained stages, from wherever it was stopped; see `train`."""
    began, world = time.monotonic(), out / "world"
    drawing = draw_world(world, WORLDS[budget])
    rehearsal = out / "rehearsal"
    if minutes and not (out / "blank").exists():
        blank_world(rehearsal / "world", some_captions(), WORLDS[budget])
        train(rehearsal, rehearsal / "world", budget, 0, updates=REHEARSAL, vae=vae)
        shutil.rmtree(rehearsal)
    if drawing.wait() != 0:
        raise RuntimeError(f"drawing the world ended with exit status {drawing.returncode}")
    used = (time.monotonic() - began) / 60
    log.info("world drawn and programs compiled after %.1f minutes", used)
    train(out, world, budget, max(minutes - used, 0.1) if minutes else 0, vae=vae)


def some_captions(count: int = 20_000) -> list[str]:
    """Captions as a world has them, enough to make the same tokens."""
    return [draw_scene(np.random.default_rng([9, i])).caption for i in range(count)]


def main() -> None:
    workdir_lib.enable_compilation_cache()
    out = Path(FLAGS.out)
    make(out, FLAGS.budget, FLAGS.minutes, MINI_VAE if FLAGS.vae == "shipped" else None)
    files = ship.ship(out / "turbo", out / "judge", out / "shipped")
    print(*files, sep="\n")


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/mini", "Directory of everything.")
    flags.DEFINE_enum("budget", "cpu", sorted(CHANGES), "What it is made on; tiny: to try it out.")
    flags.DEFINE_enum("vae", "shipped", ["shipped", "train"], "The VAE of the package, or a new "
                      "one.")
    flags.DEFINE_float("minutes", 0, "End well after so many; 0: when all updates are done.",
                       lower_bound=0)
    cli.run_command(main)
