"""Command: what the shipped mini model draws, every trained style beside the others.

    python -m dopsd_jax.mini.gallery --out dopsd_jax/assets/mini/gallery.png
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags

from dopsd_jax import sample
from dopsd_jax.core import cli
from dopsd_jax.mini import judge
from dopsd_jax.run import previews
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.pipeline import load_pipeline
from dopsd_jax.weights.shipped import JUDGE

FLAGS = flags.FLAGS
THINGS = (
    "a cat", "a frog", "an apple", "a rocket", "a house", "an umbrella", "a red car",
    "a big mushroom", "a key and a star", "a penguin and a balloon",
)


def gallery(model: str, num_steps: int, seed: int) -> np.ndarray:
    """One column per trained style, one row per thing of THINGS; uint8 [height, width, 3]."""
    pipe = load_pipeline(model, dtype="float32", remat="none")
    columns = []
    for i, style in enumerate(judge.read(str(JUDGE)).labels.trained_styles):
        prompts = [f"{thing}, {style} style" for thing in THINGS]
        first = seed + i * len(THINGS)
        pixels = sample.generate(pipe, prompts, num_steps=num_steps, seed=first)
        columns.append((style, pixels))
    return previews.grid(columns, enlarged=2)


def main() -> None:
    workdir_lib.enable_compilation_cache()
    path = Path(FLAGS.out)
    cli.check_directory(path.parent)
    print(previews.save(path, gallery(FLAGS.model, FLAGS.num_steps, FLAGS.seed)))


if __name__ == "__main__":
    flags.DEFINE_string("model", "mini", "Pipeline directory, or mini.")
    flags.DEFINE_integer("num_steps", 2, "Number of denoiser calls.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the first picture; the others follow.", lower_bound=0)
    flags.DEFINE_string("out", "gallery.png", "A PNG.")
    cli.run_command(main)
