"""Emoji sets as npm packs them (@iconify-json/*) -> RGBA sprites of every concept.

    npm install --prefix DIR @iconify-json/noto @iconify-json/noto-v1 ...   (see launch/mini.sh)

Only sets with permissive licences are read; ATTRIBUTION names their authors.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

SPRITE = 128  # pixels per side
RENDER = 256  # resvg draws at this size, then box-filtered down

# Concept -> icon name, the same in every set.
CONCEPTS: dict[str, str] = {
    "cat": "cat-face", "dog": "dog-face", "panda": "panda", "frog": "frog", "penguin": "penguin",
    "fish": "tropical-fish", "butterfly": "butterfly", "octopus": "octopus",
    "whale": "spouting-whale", "crab": "crab", "owl": "owl",
    "apple": "red-apple", "banana": "banana", "cherry": "cherries", "strawberry": "strawberry",
    "pineapple": "pineapple", "carrot": "carrot", "pizza": "pizza", "hamburger": "hamburger",
    "ice cream": "soft-ice-cream", "cake": "birthday-cake", "mushroom": "mushroom",
    "car": "automobile", "rocket": "rocket", "sailboat": "sailboat", "airplane": "airplane",
    "house": "house", "umbrella": "umbrella", "balloon": "balloon", "guitar": "guitar",
    "key": "key", "bell": "bell", "crown": "crown", "star": "star", "cactus": "cactus",
    "tulip": "tulip", "tree": "evergreen-tree", "ghost": "ghost",
    "snowman": "snowman-without-snow", "gift": "wrapped-gift",
}
HELD_OUT_CONCEPTS = ("owl", "pineapple", "sailboat", "guitar")  # a tenth, in no training picture

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


def load_sprites(packages: str | Path) -> Sprites:
    """Every (set, concept) as uint8 [SPRITE, SPRITE, 4].

    Raises:
        FileNotFoundError, ValueError: A set or an icon is missing.
    """
    sprites: Sprites = {}
    for name in SETS:
        icons = read_icons(packages, name)
        for concept, icon in CONCEPTS.items():
            sprites[name, concept] = rasterise(svg(icons, icon))
    return sprites
