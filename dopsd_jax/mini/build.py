"""Command: emoji -> the mini world's data, as plain arrays.

    python -m dopsd_jax.mini.build --out runs/mini/world

Writes <out>/{scenes,pairs,judge,judge_test}/ with pixels.npy (uint8 [N, 64, 64, 3]), captions.json,
styles.npy (int32 [N], index into labels.WORLD), concepts.npy (bool [N, 48]), counts.npy (int32 [N],
objects) and middles.npy (float32 [N, 2], of the first object, (x, y) in pixels); scenes/ and pairs/
have also placements.npy (float16 [N, 8, 8, 7], see world.placement), pairs/ also references.npy.
The same seed writes the same bytes. With --style, writes a folder of captioned pictures instead:

    python -m dopsd_jax.mini.build --style blueprint --out DIR
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from dopsd_jax.core import cli
from dopsd_jax.core.log import log
from dopsd_jax.mini import unnamed_styles, world
from dopsd_jax.mini.emoji import SETS, Sprites, load_sprites
from dopsd_jax.mini.labels import WORLD, Labels
from dopsd_jax.mini.styles import STYLES

FLAGS = flags.FLAGS
STREAMS = {"scenes": 1, "pairs": 2, "judge": 3, "judge_test": 4, "style": 5, "trained": 6}
CHUNK = 500
CELLS = 8  # per side of a picture: the transformer's tokens
_sprites: Sprites = {}


def one(kind: str, seed: int, index: int) -> dict:
    """Sample `index` of a part: pixels, caption, style, concepts, and for pairs the reference."""
    rng = np.random.default_rng([seed, STREAMS[kind], index])
    everything = kind.startswith("judge")
    scene = world.draw_scene(
        rng, styles=WORLD.styles if everything else WORLD.trained_styles,
        concepts=WORLD.concepts if everything else WORLD.trained_concepts,
    )
    first = scene.things[0]
    sample = {
        "caption": scene.caption, "style": WORLD.styles.index(scene.style),
        "concepts": WORLD.shown([t.concept for t in scene.things]), "count": len(scene.things),
        "middle": np.float32([first.x, first.y]),
    }
    if not everything:
        sample["placement"] = world.placement(scene, CELLS).astype(np.float16)
    if kind == "pairs":
        return sample | pair(scene, rng)
    return sample | {"pixels": world.render(_sprites, scene, rng)}


def pair(scene: world.Scene, rng: np.random.Generator) -> dict:
    """A scene's caption, picture and reference: another picture of the same words.

    So what is drawn from a picture in the context has its style and its things, and the place of
    these from the noise. Three in five are in a style without a name, which both pictures share;
    see `unnamed_styles`.
    """
    kind = rng.choice(["named", "filtered", "invented"], p=[0.4, 0.3, 0.3])
    style = unnamed_styles.invented_style(rng) if kind == "invented" else STYLES[scene.style]
    pixels = world.render(_sprites, scene, rng, style)
    reference = world.render(_sprites, world.rearranged(rng, scene), rng, style)
    if kind == "filtered":
        recolour = unnamed_styles.colour_filter(rng)
        pixels, reference = recolour(pixels), recolour(reference)
    caption = scene.caption
    if kind != "named":
        caption = re.sub(rf"\b{scene.style}\b", unnamed_styles.spare_word(rng), caption)
    return {"caption": caption, "pixels": pixels, "reference": reference}


def _chunk(args) -> list[dict]:
    kind, seed, start, stop = args
    return [one(kind, seed, i) for i in range(start, stop)]


def _start(sprites: Sprites) -> None:
    _sprites.update(sprites)


def build(sprites: Sprites, out: Path, kind: str, count: int, seed: int) -> None:
    """Renders one part and writes it; a part that is already complete stays as it is."""
    directory = out / kind
    if (directory / "captions.json").is_file():
        log.info("%s: already there", directory)
        return
    directory.mkdir(parents=True, exist_ok=True)
    jobs = [(kind, seed, i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
    samples: list[dict] = []
    with ProcessPoolExecutor(os.cpu_count(), initializer=_start, initargs=(sprites,)) as pool:
        for part in pool.map(_chunk, jobs):
            samples += part
            if len(samples) % (10 * CHUNK) == 0 or len(samples) == count:
                log.info("%s: %d of %d scenes", kind, len(samples), count)
    np.save(directory / "pixels.npy", np.stack([s["pixels"] for s in samples]))
    np.save(directory / "styles.npy", np.asarray([s["style"] for s in samples], np.int32))
    np.save(directory / "concepts.npy", np.stack([s["concepts"] for s in samples]))
    np.save(directory / "counts.npy", np.asarray([s["count"] for s in samples], np.int32))
    np.save(directory / "middles.npy", np.stack([s["middle"] for s in samples]))
    if kind in ("scenes", "pairs"):
        np.save(directory / "placements.npy", np.stack([s["placement"] for s in samples]))
    if kind == "pairs":
        np.save(directory / "references.npy", np.stack([s["reference"] for s in samples]))
    # Last, so that its presence says that the part is complete.
    captions = json.dumps([s["caption"] for s in samples])
    (directory / "captions.json").write_text(captions)


def write_style(
    sprites: Sprites, out: Path, style: str, count: int, seed: int,
    concepts: Sequence[str] = WORLD.trained_concepts, called: str = "",
) -> None:
    """A folder of captioned pictures in one style, as a user would bring them: NAME.png, NAME.txt.

    One object each, every one of the concepts at most once, no colour words of theirs. `called` is
    what captions call the style; by default its name.
    """
    rng = np.random.default_rng([seed, STREAMS["style"], WORLD.styles.index(style)])
    out.mkdir(parents=True, exist_ok=True)
    for concept in rng.permutation(concepts)[:count].tolist():
        scene = world.plain_scene(rng, style, concept)
        if called:
            caption = re.sub(rf"\b{style}\b", lambda _: called, scene.caption)
            scene = dataclasses.replace(scene, caption=caption)
        _write_picture(sprites, out, concept, scene, rng)
    (out / "ATTRIBUTION").write_text(f"Pictures drawn from {SETS[STYLES[style].art]}.\n")


def write_trained(sprites: Sprites, out: Path, labels: Labels, count: int, seed: int) -> None:
    """A folder of captioned scenes like those that a model of these labels was trained on."""
    out.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng([seed, STREAMS["trained"], i])
        scene = world.draw_scene(
            rng, styles=labels.trained_styles, concepts=labels.trained_concepts
        )
        _write_picture(sprites, out, f"{i:04d}", scene, rng)


def _write_picture(sprites: Sprites, out: Path, name: str, scene: world.Scene, rng) -> None:
    Image.fromarray(world.render(sprites, scene, rng)).save(out / f"{name}.png")
    (out / f"{name}.txt").write_text(scene.caption + "\n")


def main() -> None:
    sprites = load_sprites()
    out = Path(FLAGS.out)
    if FLAGS.called and not FLAGS.style:
        raise ValueError(f"--called {FLAGS.called}: expected --style with it, got none")
    if FLAGS.style:
        write_style(sprites, out, FLAGS.style, FLAGS.style_count, FLAGS.seed, called=FLAGS.called)
        return
    counts = {"scenes": FLAGS.scenes, "pairs": FLAGS.pairs, "judge": FLAGS.judge,
              "judge_test": FLAGS.judge_test}
    for kind, count in counts.items():
        build(sprites, out, kind, count, FLAGS.seed)


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/mini/world", "Directory of the data.")
    flags.DEFINE_integer("scenes", 40_000, "Captioned scenes.", lower_bound=1)
    flags.DEFINE_integer("pairs", 24_000, "Scenes with a reference picture.", lower_bound=1)
    flags.DEFINE_integer("judge", 24_000, "Scenes of every style and concept, for the judge.",
                         lower_bound=1)
    flags.DEFINE_integer("judge_test", 4_000, "The same, held back.", lower_bound=1)
    flags.DEFINE_enum("style", None, WORLD.styles, "Write captioned pictures of this style alone.")
    flags.DEFINE_string("called", "", "What captions call the style; by default its name.")
    flags.DEFINE_integer("style_count", 8, "How many of them.", lower_bound=1,
                         upper_bound=len(WORLD.trained_concepts))
    flags.DEFINE_integer("seed", 0, "Of everything.")
    cli.run_command(main)
