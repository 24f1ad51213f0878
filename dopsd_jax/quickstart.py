"""Command: the main job on the shipped model, a new style learned from eight pictures.

    python -m dopsd_jax.quickstart --out runs/quickstart

Trains a D-OPSD LoRA on the mini model, which has never seen the style, and draws the same noise
before and after: things of the eight pictures, other things, and old prompts. It runs the commands
that a user would, all in this process.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from dopsd_jax.core import cli
from dopsd_jax.mini.before_after import STYLE, before_and_after
from dopsd_jax.run import loop, previews
from dopsd_jax.run import workdir as workdir_lib

FLAGS = flags.FLAGS
CONFIG = "configs/mini_style.py"


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    flags.DEFINE_string("out", "runs/quickstart", "Where everything goes.")


def progress(workdir: Path) -> tuple[int, int]:
    """Updates that a run has saved, and those that it is to make."""
    total = workdir_lib.read_config(workdir)["num_train_steps"]
    return max(workdir_lib.saved_steps(workdir), default=0), total


def main() -> None:
    out = Path(FLAGS.out)
    cli.check_directory(out)
    workdir, lora = out / "run", out / "lora.safetensors"
    cli.run_module("dopsd_jax.train", "--config", CONFIG, "--workdir", str(workdir))
    step, total = progress(workdir)
    if step < total:
        raise SystemExit(f"stopped at step {step} of {total}; the same command goes on from there")
    cli.run_module(
        "dopsd_jax.sample", "--model", "mini", "--lora", str(workdir),
        f"--prompt=a cat, {STYLE} style", f"--prompt=a house, {STYLE} style",
        "--num_steps", "2", "--dtype", "float32", "--out", str(out / "samples"),
    )
    cli.run_module(
        "dopsd_jax.export", "--workdir", str(workdir), "--format", "diffusers", "--out", str(lora)
    )
    workdir_lib.enable_compilation_cache()
    new, old = before_and_after(workdir, "mini", "mini")
    previews.save(out / "new_style.png", new)
    previews.save(out / "old_prompts.png", old)
    print(f"""
Done. Every row of these starts from one noise; base is before tuning, tuned is after:
  the new style      {out}/new_style.png    (four things of the pictures, then four others)
  old prompts        {out}/old_prompts.png  (tuned must look as base does)
  during training    {workdir}/samples/
  curves             {workdir}/curves.png
  LoRA               {lora}   (diffusers, ComfyUI)
The same with Z-Image-Turbo and your own pictures (README, "Real weights"):
  python -m dopsd_jax.train --config configs/z_image_turbo_lora.py --workdir runs/a \\
      --config.model=Z-Image-Turbo --config.vlm=Qwen3-VL-4B-Instruct --config.data=photos""")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main, errors=(loop.TrainingError,))
