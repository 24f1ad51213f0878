"""Command: the main job on what is at hand, a tiny pipeline and a few real photographs.

    python -m dopsd_jax.quickstart --out runs/quickstart

The pipeline is written on the spot in the real file format with random weights: every file, number
and curve is real, but the pictures are noise. The photographs come with scikit-image.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from absl import flags
from PIL import Image

from dopsd_jax.core import cli
from dopsd_jax.weights.random_pipeline import write_random_pipeline

FLAGS = flags.FLAGS

PHOTOGRAPHS = {
    "astronaut": "a portrait of an astronaut in an orange suit",
    "chelsea": "a close-up of a ginger cat looking to the side",
    "coffee": "a cup of coffee with a spoon on a wooden table",
    "rocket": "a rocket on its launch pad at dusk",
}
PROMPTS = ("a ginger cat in an orange suit", "a cup of coffee beside a rocket")


def write_photographs(directory: str | Path) -> Path:
    """Writes scikit-image's photographs as a folder of images with captions beside them."""
    try:
        from skimage import data
    except ImportError as e:
        raise SystemExit(
            "error: the quickstart's photographs come with scikit-image: pip install scikit-image"
        ) from e
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, caption in PHOTOGRAPHS.items():
        Image.fromarray(getattr(data, name)()).save(directory / f"{name}.png")
        (directory / f"{name}.txt").write_text(caption + "\n")
    return directory


def run(*command: str) -> None:
    """Runs one of the project's own commands, shown first, as a user would type it."""
    print("\n$ python -m " + " ".join(command), flush=True)
    done = subprocess.run([sys.executable, "-m", *command], check=False)
    if done.returncode:
        raise SystemExit(f"error: {command[0]} ended with status {done.returncode}")


def main() -> None:
    out = Path(FLAGS.out)
    cli.check_directory(out)
    models, workdir = out / "models", out / "run"
    pipeline, vlm = models / "z_image_tiny", models / "qwen3_vl_tiny"
    if not (pipeline.is_dir() and vlm.is_dir()):
        write_random_pipeline(models)
    photographs = write_photographs(out / "photographs")
    run("dopsd_jax.train", "--config", "configs/tiny.py", "--workdir", str(workdir),
        f"--config.model={pipeline}", f"--config.vlm={vlm}", f"--config.data={photographs}")
    run("dopsd_jax.sample", "--model", str(pipeline), "--lora", str(workdir),
        *(f"--prompt={p}" for p in PROMPTS), "--num_steps", "4", "--height", "128",
        "--width", "128", "--dtype", "float32", "--out", str(out / "samples"))
    run("dopsd_jax.export", "--workdir", str(workdir), "--format", "diffusers",
        "--out", str(out / "lora.safetensors"))
    print(f"""
Done. The weights of this tiny pipeline are random, so its pictures are noise; use
--config.model with Z-Image-Turbo for real ones (README, "Real weights").
  before and after   {workdir}/samples/   (step_*.png: target, base, student, teacher)
  curves             {workdir}/curves.png
  samples            {out}/samples/
  LoRA               {out}/lora.safetensors   (diffusers, ComfyUI)""")


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/quickstart", "Where everything goes.")
    cli.run_command(main)
