"""Command: what a run of configs/mini_style.py changed, on the same noise before and after.

    python -m dopsd_jax.mini.before_after --workdir runs/style --model DIR --vlm DIR

Writes <out>/new_style.png, with concepts of the eight pictures and with others, and
<out>/old_prompts.png, which must look as before.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags

from dopsd_jax.core import cli
from dopsd_jax.method import contexts, flow, lora, sampling
from dopsd_jax.mini import world
from dopsd_jax.mini.data import to_float
from dopsd_jax.mini.emoji import load_sprites
from dopsd_jax.run import loras, previews
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.pipeline import load_pipeline, load_vision_language

FLAGS = flags.FLAGS

STYLE = "blueprint"
IN_THE_PICTURES = ("apple", "car", "penguin", "umbrella")
NOT_IN_THEM = ("cat", "mushroom", "panda", "star")  # known to the model, new in this style
OLD_PROMPTS = (
    "a red umbrella, noto style", "a cat, neon style", "a big cake, pastel style",
    "a rocket, sticker style", "a frog, ink style", "an apple, night style",
)
NUM_STEPS, TOKENS, ENLARGED, FIRST_SEED = 2, 64, 2, 7


def real_pictures(concepts: tuple[str, ...]) -> np.ndarray:
    """One real picture of each concept in the new style, uint8 [N, 64, 64, 3]."""
    sprites, rng = load_sprites(), np.random.default_rng(FIRST_SEED)
    scenes = [world.plain_scene(rng, STYLE, c) for c in concepts]
    return np.stack([world.render(sprites, scene, rng) for scene in scenes])


def before_and_after(
    workdir: str | Path, model: str | Path, vlm: str | Path
) -> tuple[np.ndarray, np.ndarray]:
    """Grids of the new style and of old prompts, each row from one noise.

    The new style's columns: a real picture, which the teacher alone is shown; the base; the tuned
    student; and the averaged teacher. Old prompts have base and student.

    Args:
        workdir: A run of configs/mini_style.py.
        model, vlm: What it was trained on.

    Returns:
        Two grids, uint8 [height, width, 3].
    """
    pipe = load_pipeline(model, dtype="float32", remat="none")
    vl = load_vision_language(vlm, pipe, dtype="float32")

    def tuned(role: str) -> dict:
        tree, spec = workdir_lib.read_lora(workdir, role=role)
        return {"params": pipe.params, "lora": loras.take_loras((tree, spec.scale), pipe)}

    # One program draws all: the base has a LoRA too, which does nothing, and every batch the same
    # number of rows. Compiling takes longer than drawing.
    student, teacher = tuned("student"), tuned("teacher")
    base = student | {"lora": lora.weakened(student["lora"], 0.0)}
    sigmas = flow.sigmas_shifted(NUM_STEPS, pipe.shift)
    side = pipe.sample_size

    def draw(variables, ctx, first_seed: int) -> np.ndarray:
        seeds = range(first_seed, first_seed + len(ctx.text))
        noise = sampling.draw_noise(seeds, pipe.denoiser.latent_shape(side, side))
        latents, _ = sampling.sample_trajectory(pipe.denoiser, variables, noise, ctx, sigmas)
        return sampling.decode(pipe, latents)

    concepts = IN_THE_PICTURES + NOT_IN_THEM
    prompts = [f"{world.with_article(c)}, {STYLE} style" for c in concepts]
    real = real_pictures(concepts)
    text = contexts.text_context(pipe, prompts, length=TOKENS)
    seen = contexts.vlm_context(
        pipe, vl, prompts, to_float(real), length=TOKENS, min_pixels=side**2, max_pixels=side**2
    )
    new = [("real", real), ("base", draw(base, text, FIRST_SEED)),
           ("tuned", draw(student, text, FIRST_SEED)),
           ("teacher", draw(teacher, seen, FIRST_SEED))]
    text = contexts.text_context(
        pipe, (OLD_PROMPTS + OLD_PROMPTS)[: len(prompts)], length=TOKENS
    )
    old = [(name, draw(variables, text, 100)[: len(OLD_PROMPTS)])
           for name, variables in (("base", base), ("tuned", student))]
    return previews.grid(new, ENLARGED), previews.grid(old, ENLARGED)


def main() -> None:
    out = Path(FLAGS.out or FLAGS.workdir)
    cli.check_directory(out)
    workdir_lib.enable_compilation_cache()
    grids = before_and_after(FLAGS.workdir, FLAGS.model, FLAGS.vlm)
    for name, grid in zip(("new_style", "old_prompts"), grids, strict=True):
        print(previews.save(out / f"{name}.png", grid))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    flags.DEFINE_string("model", "mini", "Pipeline directory that it was trained on.")
    flags.DEFINE_string("vlm", "mini", "Its Qwen3-VL directory.")
    flags.DEFINE_string("out", None, "Where the two pictures go; default: the run's directory.")
    cli.run_command(main)
