"""Command: emoji packages -> the mini world's data, as plain arrays.

    python -m dopsd_jax.mini.build --packages node_modules --out runs/mini/world

Writes <out>/{scenes,pairs,judge,judge_test}/ with pixels.npy (uint8 [N, 64, 64, 3]), captions.json,
styles.npy (int32 [N], index into world.STYLES), concepts.npy (bool [N, 40]); pairs/ has also
references.npy. The same seed writes the same bytes. With --style, writes a folder of captioned
pictures instead:

    python -m dopsd_jax.mini.build --packages node_modules --style blueprint --out DIR
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from dopsd_jax.core import cli
from dopsd_jax.core.log import log
from dopsd_jax.mini import world
from dopsd_jax.mini.emoji import CONCEPTS, SETS, Sprites, load_sprites

FLAGS = flags.FLAGS
ALL_CONCEPTS = tuple(CONCEPTS)
ALL_STYLES = tuple(world.STYLES)
# Names that stand for "as in the picture": their look is drawn anew for every pair.
SPARE_STYLES = (
    "special", "secret", "mystery", "custom", "brand", "novel", "private", "fancy",
)
STREAMS = {"scenes": 1, "pairs": 2, "judge": 3, "judge_test": 4, "style": 5}
CHUNK = 500
_sprites: Sprites = {}


def random_look(rng: np.random.Generator):
    """A colour filter no style has: a function on uint8 [.., 3] pixels.

    A duotone, an exchange of channels, an inversion or a tint; they teach the image context to
    carry looks that have no word.
    """
    kind = rng.integers(4)
    if kind == 0:
        ends = rng.uniform(0, 1, (2, 3)).astype(np.float32)
        while np.abs(ends[0] - ends[1]).sum() < 1.0:
            ends = rng.uniform(0, 1, (2, 3)).astype(np.float32)

        def look(x):
            y = np.clip((world.luminance(x) - 0.1) / 0.8, 0, 1)[..., None]
            return ends[0] * (1 - y) + ends[1] * y
    elif kind == 1:
        order = rng.permutation(3)

        def look(x):
            return x[..., order]
    elif kind == 2:
        order = rng.permutation(3)

        def look(x):
            return 1 - x[..., order]
    else:
        colour = rng.uniform(0.1, 1, 3).astype(np.float32)
        share = rng.uniform(0.4, 0.8)

        def look(x):
            return (1 - share) * x + share * world.luminance(x)[..., None] * colour * 1.4

    def apply(pixels: np.ndarray) -> np.ndarray:
        x = look(pixels.astype(np.float32) / 255)
        return np.clip(x * 255 + 0.5, 0, 255).astype(np.uint8)

    return apply


def one(kind: str, seed: int, index: int) -> dict:
    """Sample `index` of a part: pixels, caption, style, concepts, and for pairs the reference."""
    rng = np.random.default_rng([seed, STREAMS[kind], index])
    everything = kind.startswith("judge")
    scene = world.draw_scene(
        rng, styles=ALL_STYLES if everything else world.TRAINED_STYLES,
        concepts=ALL_CONCEPTS if everything else world.TRAINED_CONCEPTS,
    )
    sample = {
        "pixels": world.render(_sprites, scene, rng), "caption": scene.caption,
        "style": ALL_STYLES.index(scene.style),
        "concepts": np.isin(ALL_CONCEPTS, [t.concept for t in scene.things]),
    }
    if kind != "pairs":
        return sample
    # The teacher's picture: the target itself, or another one of the same words.
    if rng.uniform() < 0.5:
        sample["reference"] = sample["pixels"]
    else:
        sample["reference"] = world.render(_sprites, world.rearranged(rng, scene), rng)
    if rng.uniform() < 0.6:
        look = random_look(rng)
        sample["pixels"], sample["reference"] = look(sample["pixels"]), look(sample["reference"])
        word = str(rng.choice(SPARE_STYLES))
        sample["caption"] = sample["caption"].replace(scene.style, word)
    return sample


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
    if kind == "pairs":
        np.save(directory / "references.npy", np.stack([s["reference"] for s in samples]))
    # Last, so that its presence says that the part is complete.
    captions = json.dumps([s["caption"] for s in samples])
    (directory / "captions.json").write_text(captions)


def write_style(sprites: Sprites, out: Path, style: str, count: int, seed: int) -> None:
    """A folder of captioned pictures in one style, as a user would bring them: NAME.png, NAME.txt.

    One object each, every concept at most once, no colour words.
    """
    rng = np.random.default_rng([seed, STREAMS["style"], ALL_STYLES.index(style)])
    out.mkdir(parents=True, exist_ok=True)
    for concept in rng.permutation(world.TRAINED_CONCEPTS)[:count].tolist():
        scene = world.draw_scene(rng, style=style, concept=concept, two=0.0, tinted=0.0)
        name = concept.replace(" ", "-")
        Image.fromarray(world.render(sprites, scene, rng)).save(out / f"{name}.png")
        (out / f"{name}.txt").write_text(scene.caption + "\n")
    (out / "ATTRIBUTION").write_text(
        f"Pictures drawn from {SETS[world.STYLES[style].art]}.\n"
    )


def main() -> None:
    sprites = load_sprites(FLAGS.packages)
    out = Path(FLAGS.out)
    if FLAGS.style:
        write_style(sprites, out, FLAGS.style, FLAGS.style_count, FLAGS.seed)
        return
    counts = {"scenes": FLAGS.scenes, "pairs": FLAGS.pairs, "judge": FLAGS.judge,
              "judge_test": FLAGS.judge_test}
    for kind, count in counts.items():
        build(sprites, out, kind, count, FLAGS.seed)


if __name__ == "__main__":
    flags.DEFINE_string("packages", None, "node_modules with the @iconify-json sets.",
                        required=True)
    flags.DEFINE_string("out", "runs/mini/world", "Directory of the data.")
    flags.DEFINE_integer("scenes", 40_000, "Captioned scenes.", lower_bound=1)
    flags.DEFINE_integer("pairs", 24_000, "Scenes with a reference picture.", lower_bound=1)
    flags.DEFINE_integer("judge", 24_000, "Scenes of every style and concept, for the judge.",
                         lower_bound=1)
    flags.DEFINE_integer("judge_test", 4_000, "The same, held back.", lower_bound=1)
    flags.DEFINE_enum("style", None, ALL_STYLES, "Write captioned pictures of this style alone.")
    flags.DEFINE_integer("style_count", 8, "How many of them.", lower_bound=1, upper_bound=36)
    flags.DEFINE_integer("seed", 0, "Of everything.")
    cli.run_command(main)
