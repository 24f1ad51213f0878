"""The mini world: scenes of one to three emoji in many styles; captions leave most of it open.

Place, size, tilt, mirroring and ground are drawn at random and mostly not in the caption: where it
fixes the picture, four plain steps are as good as forty, and no few-step ability can be lost. Now
and then a caption tells a size, a colour, a place, or how many of a thing there are.

Every scene is a function of (seed, index) alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from PIL import Image

from dopsd_jax.mini.emoji import CONCEPTS, HELD_OUT_CONCEPTS, SPRITE, Sprites
from dopsd_jax.mini.styles import CANVAS, SIZE, STYLES, TRAINED_STYLES, Rng, Style

TRAINED_CONCEPTS = tuple(c for c in CONCEPTS if c not in HELD_OUT_CONCEPTS)
TWO = 0.1               # share of scenes with two different things
COUNTED = 0.1           # share of scenes with two or three of one thing
PLACED = 0.25           # share of the scenes with one thing whose captions tell its place
# Sizes of the objects of a scene in pixels, by how many it has, and from where on a caption may
# call one small or big. Smaller than this, an object is three of the transformer's tokens across.
SIZES = {1: (36.0, 56.0), 2: (28.0, 36.0), 3: (24.0, 30.0)}
TOLD = {1: (41.0, 51.0), 2: (30.0, 34.0), 3: (24.0, 30.0)}
NUMBERS = {2: "two", 3: "three"}
PLURALS = {
    "butterfly": "butterflies", "fish": "fish", "octopus": "octopuses", "scissors": "scissors",
    "strawberry": "strawberries", "hourglass": "hourglasses", "trophy": "trophies",
}
TINTS = {
    "red": (0.9, 0.15, 0.15), "orange": (1.0, 0.55, 0.1), "green": (0.2, 0.75, 0.25),
    "blue": (0.2, 0.4, 0.95), "purple": (0.6, 0.25, 0.85), "pink": (1.0, 0.5, 0.75),
}
# What a caption may say of a thing's place -> whether its middle, in pixels from the picture's, is
# there. Away from the middle by so much that large things can be called so too.
PLACES: dict[str, Callable[[float, float], bool]] = {
    "on the left": lambda x, y: x < -5 and abs(y) < 5,
    "on the right": lambda x, y: x > 5 and abs(y) < 5,
    "at the top": lambda x, y: y < -5 and abs(x) < 5,
    "at the bottom": lambda x, y: y > 5 and abs(x) < 5,
    "in the middle": lambda x, y: max(abs(x), abs(y)) < 3,
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a scene; lengths in scene pixels, tilt in degrees."""

    concept: str
    size: float
    x: float
    y: float
    tilt: float
    mirrored: bool
    tint: str | None


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows; `caption` tells the part of it that a user would tell.

    Attributes:
        style: A key of STYLES.
        things: One to three objects.
        caption: Names the style, every kind of thing, and the place if there is one.
        place: A key of PLACES, or None where the caption tells none.
    """

    style: str
    things: tuple[Thing, ...]
    caption: str
    place: str | None = None


def place_of(thing: Thing) -> str | None:
    """The key of PLACES for where a thing is, if there is one."""
    x, y = thing.x - SIZE / 2, thing.y - SIZE / 2
    return next((name for name, holds in PLACES.items() if holds(x, y)), None)


def _thing(rng: Rng, concept: str, sizes: tuple[float, float], tint: str | None) -> Thing:
    size = rng.uniform(*sizes)
    margin = 0.46 * size
    x, y = rng.uniform(margin, SIZE - margin, 2)
    return Thing(concept, size, x, y, rng.uniform(-25, 25), bool(rng.uniform() < 0.5), tint)


def _apart(things: tuple[Thing, ...]) -> bool:
    """Whether no object hides another."""
    return all(
        np.hypot(a.x - b.x, a.y - b.y) > 0.42 * (a.size + b.size)
        for a, b in itertools.combinations(things, 2)
    )


def _arranged(
    rng: Rng, concepts: list[str], tints: list[str | None], place: str | None
) -> tuple[Thing, ...]:
    """Objects at random, again and again until none hides another and the place is right."""
    while True:
        things = tuple(
            _thing(rng, c, SIZES[len(concepts)], t) for c, t in zip(concepts, tints, strict=True)
        )
        if _apart(things) and (place is None or place_of(things[0]) == place):
            return things


def _phrase(rng: Rng, thing: Thing, limits: tuple[float, float]) -> str:
    words = [thing.concept]
    if thing.tint:
        words.insert(0, thing.tint)
    if thing.size < limits[0] and rng.uniform() < 0.5:
        words.insert(0, "small")
    elif thing.size > limits[1] and rng.uniform() < 0.5:
        words.insert(0, "big")
    return with_article(" ".join(words))


def with_article(words: str) -> str:
    """ "apple" -> "an apple"."""
    return f"{'an' if words[0] in 'aeiou' or words.startswith('hour') else 'a'} {words}"


def plural(concept: str) -> str:
    return PLURALS.get(concept, concept + "s")


def _told(rng: Rng, things: tuple[Thing, ...], place: str | None) -> str:
    """The objects in words."""
    first = things[0]
    if len(things) > 1 and all(t.concept == first.concept for t in things):
        words = [NUMBERS[len(things)], *([first.tint] if first.tint else []), plural(first.concept)]
        return " ".join(words)
    words = " and ".join(_phrase(rng, t, TOLD[len(things)]) for t in things)
    return f"{words} {place}" if place else words


TEMPLATES = (
    "{things}, {style} style", "{things} in {style} style", "{style} style, {things}",
    "a {style} picture of {things}", "a picture of {things} in the style of {style}",
)


def draw_scene(
    rng: Rng, *, styles=TRAINED_STYLES, concepts=TRAINED_CONCEPTS, style: str | None = None,
    concept: str | None = None, two: float = TWO, counted: float = COUNTED, tinted: float = 0.15,
    placed: float = PLACED,
) -> Scene:
    """A random scene.

    Args:
        rng: Source of every choice.
        styles, concepts: What to choose from.
        style, concept: Fixed choices, of the style and the first object.
        two: Share of scenes with a second, different object.
        counted: Share of scenes with two or three of the same object, in one colour.
        tinted: Share of objects in a colour of TINTS, which the caption always tells.
        placed: Share of the scenes of one object whose caption tells its place.
    """
    style = style or str(rng.choice(styles))
    shown = [concept or str(rng.choice(concepts))]
    kind = rng.uniform()
    if kind < two:
        shown.append(str(rng.choice([c for c in concepts if c != shown[0]])))
    elif kind < two + counted:
        shown *= int(rng.choice([2, 3], p=[0.7, 0.3]))
    tints = [str(rng.choice(list(TINTS))) if rng.uniform() < tinted else None for _ in shown]
    if kind >= two:
        tints = tints[:1] * len(shown)
    place = None
    if len(shown) == 1 and rng.uniform() < placed:
        place = str(rng.choice(list(PLACES)))
    things = _arranged(rng, shown, tints, place)
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    caption = template.format(things=_told(rng, things, place), style=style)
    return Scene(style, things, caption, place)


def plain_scene(rng: Rng, style: str, concept: str) -> Scene:
    """A random scene of one object in its own colours, as a user's picture of it would be."""
    return draw_scene(
        rng, style=style, concept=concept, two=0.0, counted=0.0, tinted=0.0, placed=0.0
    )


def place(sprite: np.ndarray, thing: Thing) -> np.ndarray:
    """The sprite of a thing on an empty canvas: float32 [CANVAS, CANVAS, 4], straight alpha."""
    scale = SPRITE / (thing.size * CANVAS / SIZE)
    c, s = np.cos(np.radians(thing.tilt)) * scale, np.sin(np.radians(thing.tilt)) * scale
    cx, cy = thing.x * CANVAS / SIZE, thing.y * CANVAS / SIZE
    flip = -1.0 if thing.mirrored else 1.0
    half = SPRITE / 2
    matrix = (flip * c, flip * s, half - flip * (c * cx + s * cy), -s, c, half + s * cx - c * cy)
    image = Image.fromarray(sprite).convert("RGBa").transform(
        (CANVAS, CANVAS), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(image.convert("RGBA"), np.float32) / 255


PLACEMENT = 7  # numbers that `placement` tells of every cell


def placement(scene: Scene, cells: int) -> np.ndarray:
    """How the object lies that covers a cell of the picture, for every cell.

    Args:
        cells: Cells per side.

    Returns:
        float32 [cells, cells, 7], rows first: 1 where the cell's middle lies in an object's tilted
        square; where in there, across and down, each in [-1, 1]; cosine and sine of the tilt;
        half a picture over the object's size; -1 if mirrored, else 1. All zero in no object.
    """
    y, x = (np.mgrid[0:cells, 0:cells].astype(np.float32) + 0.5) * (SIZE / cells)
    result = np.zeros((cells, cells, PLACEMENT), np.float32)
    for thing in scene.things:  # a later one is drawn over an earlier one
        c, s = np.cos(np.radians(thing.tilt)), np.sin(np.radians(thing.tilt))
        dx, dy = (2 / thing.size) * (x - thing.x), (2 / thing.size) * (y - thing.y)
        across, down = c * dx + s * dy, c * dy - s * dx
        planes = [np.ones_like(x), across, down, *(
            np.full_like(x, v)
            for v in (c, s, SIZE / 2 / thing.size, -1.0 if thing.mirrored else 1.0)
        )]
        inside = np.maximum(np.abs(across), np.abs(down)) <= 1
        result = np.where(inside[..., None], np.stack(planes, axis=-1), result)
    return result.astype(np.float32)


def render(
    sprites: Sprites, scene: Scene, rng: Rng, style: Style | None = None
) -> np.ndarray:
    """The picture of a scene, uint8 [SIZE, SIZE, 3]; `rng` draws the ground.

    `style` takes the place of the one that the scene names.
    """
    style = style or STYLES[scene.style]
    canvas = style.ground(rng)
    for thing in scene.things:
        layer = place(sprites[style.art, thing.concept], thing)
        canvas = style.draw(canvas, layer, TINTS.get(thing.tint), rng)
    if style.finish is not None:
        canvas = style.finish(canvas, rng)
    small = canvas.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
    return np.clip(small * 255 + 0.5, 0, 255).astype(np.uint8)


def rearranged(rng: Rng, scene: Scene) -> Scene:
    """The same words over another layout: new place, size, tilt and mirroring of every object.

    Where the words tell a place, it stays true.
    """
    things = _arranged(
        rng, [t.concept for t in scene.things], [t.tint for t in scene.things], scene.place
    )
    return dataclasses.replace(scene, things=things)
