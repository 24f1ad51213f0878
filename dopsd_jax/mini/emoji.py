"""The emoji that the mini world is made of: one sheet of sprites per set, shipped.

The sheets are drawn from the sets as npm packs them, which this command repeats:

    npm install --prefix DIR @iconify-json/noto @iconify-json/noto-v1 ..   (all of SETS)
    pip install -e '.[emoji]'
    python -m dopsd_jax.mini.emoji --packages DIR/node_modules --out dopsd_jax/assets/emoji

Only sets with permissive licences are read; ATTRIBUTION beside the sheets names their authors.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from dopsd_jax.core import cli
from dopsd_jax.weights.shipped import ASSETS

FLAGS = flags.FLAGS
SHEETS = ASSETS / "emoji"
COLUMNS = 8  # sprites per row of a sheet
SPRITE = 128  # pixels per side
RENDER = 256  # resvg draws at this size, then box-filtered down

# Concept -> icon name, the same in every set; a concept is one word. How soon a small model learns
# to draw is how often it sees each thing in each style.
CONCEPTS: dict[str, str] = {
    "cat": "cat-face", "panda": "panda", "frog": "frog", "penguin": "penguin",
    "butterfly": "butterfly", "owl": "owl", "rabbit": "rabbit-face", "fish": "tropical-fish",
    "octopus": "octopus", "elephant": "elephant", "whale": "spouting-whale", "snail": "snail",
    "apple": "red-apple", "banana": "banana", "hamburger": "hamburger", "cake": "birthday-cake",
    "mushroom": "mushroom", "pizza": "pizza", "strawberry": "strawberry",
    "pineapple": "pineapple", "watermelon": "watermelon", "doughnut": "doughnut",
    "carrot": "carrot", "car": "automobile", "rocket": "rocket", "sailboat": "sailboat",
    "airplane": "airplane", "bicycle": "bicycle", "house": "house", "umbrella": "umbrella",
    "balloon": "balloon", "guitar": "guitar", "key": "key", "anchor": "anchor", "bell": "bell",
    "scissors": "scissors", "camera": "camera", "crown": "crown", "candle": "candle",
    "hourglass": "hourglass-done", "trophy": "trophy", "star": "star", "cactus": "cactus",
    "sunflower": "sunflower", "tree": "evergreen-tree", "snowman": "snowman",
    "moon": "crescent-moon", "heart": "red-heart",
}
HELD_OUT_CONCEPTS = ("owl", "snail", "guitar", "trophy")  # in no training picture

SETS: dict[str, str] = {
    "noto": "Noto Emoji, Google, Apache-2.0",
    "noto-v1": "Noto Emoji (blob, 2013-2017), Google, Apache-2.0",
    "twemoji": "Twemoji, Twitter and contributors, CC BY 4.0",
    "fluent-emoji-flat": "Fluent Emoji, Microsoft, MIT",
    "fluent-emoji-high-contrast": "Fluent Emoji (high contrast), Microsoft, MIT",
    "emojione": "Emoji One 2, JoyPixels, CC BY 4.0",
    "emojione-monotone": "Emoji One (monotone), JoyPixels, CC BY 4.0",
}

Sprites = dict[tuple[str, str], np.ndarray]


def read_icons(packages: str | Path, name: str) -> dict:
    """icons.json of one set.

    Raises:
        FileNotFoundError: The set is not installed there; says which command installs it.
    """
    file = Path(packages) / "@iconify-json" / name / "icons.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; expected the node_modules of "
            f"`npm install {' '.join(f'@iconify-json/{s}' for s in SETS)}`"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def svg(icons: dict, name: str) -> str:
    """The drawing of an icon as a whole SVG document; aliases are followed.

    Raises:
        ValueError: The set has no such icon.
    """
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    if name not in icons["icons"]:
        raise ValueError(f"{icons['prefix']}: expected an icon {name!r}, found none")
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDER}" height="{RENDER}" viewBox="0 0 {width} {height}">'
        f'{icon["body"].replace("currentColor", "#000000")}</svg>'
    )


def rasterise(document: str) -> np.ndarray:
    """An SVG document -> uint8 [SPRITE, SPRITE, 4], straight alpha."""
    import resvg_py  # only whoever renders the world needs it

    png = bytes(resvg_py.svg_to_bytes(svg_string=document))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    # Through premultiplied alpha, or transparent black bleeds into the rim.
    image = image.convert("RGBa").resize((SPRITE, SPRITE), Image.Resampling.BOX).convert("RGBA")
    return np.asarray(image)


def render_sprites(packages: str | Path) -> Sprites:
    """Every (set, concept) as uint8 [SPRITE, SPRITE, 4], drawn from the sets' SVGs.

    Raises:
        FileNotFoundError, ValueError: A set or an icon is missing.
    """
    sprites: Sprites = {}
    for name in SETS:
        icons = read_icons(packages, name)
        for concept, icon in CONCEPTS.items():
            sprites[name, concept] = rasterise(svg(icons, icon))
    return sprites


def write_sheets(sprites: Sprites, out: Path) -> None:
    """One PNG per set, its concepts in the order of CONCEPTS, row by row; and ATTRIBUTION."""
    out.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        tiles = np.stack([sprites[name, concept] for concept in CONCEPTS])
        sheet = tiles.reshape(-1, COLUMNS, SPRITE, SPRITE, 4).transpose(0, 2, 1, 3, 4)
        sheet = sheet.reshape(-1, COLUMNS * SPRITE, 4)
        Image.fromarray(sheet).save(out / f"{name}.png", optimize=True)
    lines = [f"{name}.png: {credit}" for name, credit in SETS.items()]
    (out / "ATTRIBUTION").write_text("\n".join(lines) + "\n")


def load_sprites(directory: str | Path = SHEETS) -> Sprites:
    """Every (set, concept) as uint8 [SPRITE, SPRITE, 4], straight alpha, from the sheets.

    Raises:
        FileNotFoundError: No sheet of a set.
        ValueError: A sheet of another size or without alpha.
    """
    sprites: Sprites = {}
    size = (COLUMNS * SPRITE, len(CONCEPTS) // COLUMNS * SPRITE)
    for name in SETS:
        file = Path(directory) / f"{name}.png"
        sheet = Image.open(file)
        if sheet.size != size or sheet.mode != "RGBA":
            raise ValueError(
                f"{file}: expected RGBA, {size[0]}x{size[1]} (width x height), got {sheet.mode}, "
                f"{sheet.width}x{sheet.height}"
            )
        tiles = np.asarray(sheet).reshape(-1, SPRITE, COLUMNS, SPRITE, 4).swapaxes(1, 2)
        tiles = tiles.reshape(-1, SPRITE, SPRITE, 4)
        sprites |= {(name, c): tile for c, tile in zip(CONCEPTS, tiles, strict=True)}
    return sprites


def main() -> None:
    write_sheets(render_sprites(FLAGS.packages), Path(FLAGS.out))


if __name__ == "__main__":
    flags.DEFINE_string("packages", None, "node_modules with the @iconify-json sets.",
                        required=True)
    flags.DEFINE_string("out", None, "Directory of the sheets.", required=True)
    cli.run_command(main)
