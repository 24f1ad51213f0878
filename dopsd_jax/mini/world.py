"""The mini world: scenes of one or two emoji, in several styles, with captions that leave choices.

Place, size, tilt, mirroring and background are drawn at random and mostly not in the caption: where
it fixes the picture, four plain steps are as good as forty, and no few-step ability can be lost.

Every scene is a function of (seed, index) alone.
"""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from dopsd_jax.mini.emoji import CONCEPTS, HELD_OUT_CONCEPTS, SPRITE, Sprites

SIZE = 64               # pixels per side of a scene
CANVAS = 2 * SIZE       # scenes are drawn at twice the size and box-filtered down
TRAINED_CONCEPTS = tuple(c for c in CONCEPTS if c not in HELD_OUT_CONCEPTS)
TWO = 0.12              # share of scenes with a second object
# Sizes of the objects of a scene in pixels, by how many it has, and from where on a caption may
# call one small or big. Smaller than this, an object is three of the transformer's tokens across.
SIZES = {1: (36.0, 56.0), 2: (28.0, 36.0)}
TOLD = {1: (41.0, 51.0), 2: (30.0, 34.0)}
TINTS = {
    "red": (0.9, 0.15, 0.15), "orange": (1.0, 0.55, 0.1), "green": (0.2, 0.75, 0.25),
    "blue": (0.2, 0.4, 0.95), "purple": (0.6, 0.25, 0.85), "pink": (1.0, 0.5, 0.75),
}
Rng = np.random.Generator
Canvas = np.ndarray  # float32 [CANVAS, CANVAS, 3] in [0, 1]


@dataclasses.dataclass(frozen=True)
class Style:
    """A style: which set it draws, on which background, and how.

    Attributes:
        art: Name of the emoji set.
        background: rng -> Canvas.
        draw: (canvas, layer float32 [.., 4] straight alpha, tint or None, rng) -> Canvas.
    """

    art: str
    background: Callable[[Rng], Canvas]
    draw: Callable[[Canvas, np.ndarray, tuple | None, Rng], Canvas]


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


# Backgrounds.

GRID_Y, GRID_X = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) / CANVAS


def hsv(h: float, s: float, v: float) -> np.ndarray:
    return np.asarray(colorsys.hsv_to_rgb(h % 1.0, s, v), np.float32)


def mix(a, b, weight: np.ndarray) -> Canvas:
    return a * (1 - weight[..., None]) + b * weight[..., None]


def gradient(rng: Rng, a, b) -> Canvas:
    angle = rng.uniform(0, 2 * np.pi)
    along = (GRID_X - 0.5) * np.cos(angle) + (GRID_Y - 0.5) * np.sin(angle) + 0.5
    return mix(a, b, np.clip(along, 0, 1)).astype(np.float32)


def _soft(rng: Rng) -> Canvas:
    """Two light hues run into each other."""
    h = rng.uniform()
    return gradient(rng, hsv(h, rng.uniform(0.1, 0.35), 0.97),
                     hsv(h + rng.uniform(-0.3, 0.3), rng.uniform(0.2, 0.5), 0.92))


def _stripes(rng: Rng) -> Canvas:
    """Vivid stripes of two shades of one hue."""
    h, angle, width = rng.uniform(), rng.uniform(0, np.pi), rng.uniform(0.12, 0.3)
    along = (GRID_X * np.cos(angle) + GRID_Y * np.sin(angle)) / width + rng.uniform()
    weight = (np.floor(along) % 2).astype(np.float32)
    return mix(hsv(h, 0.75, 0.95), hsv(h, 0.9, 0.75), weight)


def _paper(rng: Rng) -> Canvas:
    """Off-white, slightly uneven."""
    base = hsv(rng.uniform(0.08, 0.16), rng.uniform(0.03, 0.1), rng.uniform(0.93, 0.99))
    return gradient(rng, base, base * rng.uniform(0.9, 0.98))


def _dark(rng: Rng) -> Canvas:
    """Near black with a hint of a hue, lighter in one place."""
    h = rng.uniform()
    d = np.hypot(GRID_X - rng.uniform(0.2, 0.8), GRID_Y - rng.uniform(0.2, 0.8))
    return mix(hsv(h, 0.7, 0.22), hsv(h, 0.8, 0.05), np.clip(1.6 * d, 0, 1))


def _night(rng: Rng) -> Canvas:
    """Dark blue above, violet below, with stars."""
    canvas = mix(hsv(rng.uniform(0.6, 0.68), 0.85, 0.22), hsv(rng.uniform(0.7, 0.8), 0.6, 0.4),
                  GRID_Y).astype(np.float32)
    for _ in range(rng.integers(6, 16)):
        y, x = rng.integers(0, CANVAS - 3, 2)
        canvas[y : y + 2, x : x + 2] = 0.95
    return canvas


def _cream(rng: Rng) -> Canvas:
    """White with a few large, pale blots."""
    canvas = np.ones((CANVAS, CANVAS, 3), np.float32) * 0.98
    for _ in range(rng.integers(2, 5)):
        r = rng.uniform(0.1, 0.3)
        d = np.hypot(GRID_X - rng.uniform(), GRID_Y - rng.uniform())
        canvas = mix(canvas, hsv(rng.uniform(), 0.25, 1.0), np.clip((r - d) * 20, 0, 1) * 0.8)
    return canvas


def _grid(rng: Rng) -> Canvas:
    """Blueprint paper: blue with a fine lighter grid."""
    base = hsv(rng.uniform(0.58, 0.63), 0.85, rng.uniform(0.55, 0.75))
    step, oy, ox = int(rng.integers(14, 24)), *rng.integers(0, 14, 2)
    i = np.arange(CANVAS)
    lines = ((i + oy) % step < 2)[:, None] | ((i + ox) % step < 2)[None]
    return mix(base, np.ones(3, np.float32), lines * np.float32(0.25))


def _tan(rng: Rng) -> Canvas:
    """Old paper, darker towards the rim."""
    base = hsv(rng.uniform(0.09, 0.12), 0.35, rng.uniform(0.85, 0.93))
    d = np.hypot(GRID_X - 0.5, GRID_Y - 0.5)
    return mix(base, base * 0.7, np.clip(d * 1.3, 0, 1) ** 2)


# Ways of drawing. `layer` is the placed sprite, straight alpha, already tinted where art has
# colours of its own.


def luminance(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.asarray([0.299, 0.587, 0.114], np.float32)


def _tinted(rgb: np.ndarray, tint) -> np.ndarray:
    if tint is None:
        return rgb
    shade = np.clip(luminance(rgb)[..., None] * 0.75 + 0.3, 0, 1)
    return 0.2 * rgb + 0.8 * np.clip(shade * np.asarray(tint, np.float32) * 1.2, 0, 1)


def _filtered(alpha: np.ndarray, kernel) -> np.ndarray:
    image = Image.fromarray((alpha * 255).astype(np.uint8))
    return np.asarray(image.filter(kernel), np.float32) / 255


def _plain(canvas, layer, tint, rng) -> Canvas:
    return mix(canvas, _tinted(layer[..., :3], tint), layer[..., 3])


def _sticker(canvas, layer, tint, rng) -> Canvas:
    rim = _filtered(_filtered(layer[..., 3], ImageFilter.MaxFilter(9)),
                    ImageFilter.GaussianBlur(0.7))
    shadow = np.roll(_filtered(rim, ImageFilter.GaussianBlur(3)), (4, 4), (0, 1))
    canvas = canvas * (1 - 0.45 * shadow[..., None])
    return _plain(mix(canvas, np.ones(3, np.float32), rim), layer, tint, rng)


def _ink(canvas, layer, tint, rng) -> Canvas:
    colour = np.asarray(tint or (0.08, 0.08, 0.14), np.float32) * (0.75 if tint else 1.0)
    return mix(canvas, colour, layer[..., 3] * (1 - luminance(layer[..., :3])))


def _neon(canvas, layer, tint, rng) -> Canvas:
    colour = np.asarray(tint or hsv(rng.uniform(), 0.75, 1.0), np.float32)
    line = layer[..., 3] * (1 - luminance(layer[..., :3]))
    glow = _filtered(line, ImageFilter.GaussianBlur(6))[..., None] * colour
    return np.clip(mix(canvas + 0.8 * glow, 0.35 + 0.65 * colour, line), 0, 1)


def _moonlit(canvas, layer, tint, rng) -> Canvas:
    rgb = _tinted(layer[..., :3], tint)
    rgb = 0.75 * rgb * np.asarray([0.75, 0.85, 1.1], np.float32) + np.asarray(
        [0.02, 0.03, 0.15], np.float32
    )
    return mix(canvas, np.clip(rgb, 0, 1), layer[..., 3])


def _pastel(canvas, layer, tint, rng) -> Canvas:
    rgb = 0.45 * _tinted(layer[..., :3], tint) + 0.55
    return mix(canvas, rgb, 0.92 * layer[..., 3])


def _white(canvas, layer, tint, rng) -> Canvas:
    colour = np.asarray(tint, np.float32) * 0.4 + 0.6 if tint else np.ones(3, np.float32)
    return mix(canvas, colour, 0.95 * layer[..., 3] * (1 - luminance(layer[..., :3])))


def _sepia(canvas, layer, tint, rng) -> Canvas:
    dark, light = np.asarray([0.25, 0.13, 0.05]), np.asarray([0.9, 0.75, 0.5])
    rgb = mix(dark, light, luminance(layer[..., :3]) ** 1.2).astype(np.float32)
    return mix(canvas, rgb, layer[..., 3])


STYLES: dict[str, Style] = {
    "noto": Style("noto", _soft, _plain),
    "sticker": Style("twemoji", _stripes, _sticker),
    "ink": Style("fluent-emoji-high-contrast", _paper, _ink),
    "neon": Style("fluent-emoji-high-contrast", _dark, _neon),
    "night": Style("noto-v1", _night, _moonlit),
    "pastel": Style("fluent-emoji-flat", _cream, _pastel),
    "blueprint": Style("emojione-monotone", _grid, _white),
    "sepia": Style("emojione", _tan, _sepia),
}
# Neither their look nor their art is in a training picture.
HELD_OUT_STYLES = ("blueprint", "sepia")
TRAINED_STYLES = tuple(s for s in STYLES if s not in HELD_OUT_STYLES)


# Scenes.


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows; `caption` tells the part of it that a user would tell."""

    style: str
    things: tuple[Thing, ...]
    caption: str


def _thing(rng: Rng, concept: str, smallest: float, largest: float, tinted: float) -> Thing:
    size = rng.uniform(smallest, largest)
    margin = 0.46 * size
    x, y = rng.uniform(margin, SIZE - margin, 2)
    tint = str(rng.choice(list(TINTS))) if rng.uniform() < tinted else None
    return Thing(concept, size, x, y, rng.uniform(-25, 25), bool(rng.uniform() < 0.5), tint)


def _apart(things: tuple[Thing, ...]) -> bool:
    """Whether no object hides another."""
    return all(
        np.hypot(a.x - b.x, a.y - b.y) > 0.42 * (a.size + b.size)
        for a, b in itertools.combinations(things, 2)
    )


def _first_apart(draw: Callable[[], tuple[Thing, ...]]) -> tuple[Thing, ...]:
    things = draw()
    while not _apart(things):
        things = draw()
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
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


TEMPLATES = (
    "{things}, {style} style", "{things} in {style} style", "{style} style, {things}",
    "a {style} picture of {things}", "a picture of {things} in the style of {style}",
)


def draw_scene(
    rng: Rng, *, styles=TRAINED_STYLES, concepts=TRAINED_CONCEPTS, style: str | None = None,
    concept: str | None = None, two: float = TWO, tinted: float = 0.15,
) -> Scene:
    """A random scene.

    Args:
        rng: Source of every choice.
        styles, concepts: What to choose from.
        style, concept: Fixed choices, of the style and the first object.
        two: Share of scenes with a second object.
        tinted: Share of objects in a colour of TINTS, which the caption always tells.
    """
    style = style or str(rng.choice(styles))
    first = concept or str(rng.choice(concepts))
    shown = [first]
    if rng.uniform() < two:
        shown.append(str(rng.choice([c for c in concepts if c != first])))
    things = _first_apart(lambda: tuple(_thing(rng, c, *SIZES[len(shown)], tinted) for c in shown))
    phrase = " and ".join(_phrase(rng, t, TOLD[len(shown)]) for t in things)
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    return Scene(style, things, template.format(things=phrase, style=style))


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
    """The picture of a scene, uint8 [SIZE, SIZE, 3]; `rng` draws the background.

    `style` takes the place of the one that the scene names.
    """
    style = style or STYLES[scene.style]
    canvas = style.background(rng)
    for thing in scene.things:
        layer = place(sprites[style.art, thing.concept], thing)
        canvas = style.draw(canvas, layer, TINTS.get(thing.tint), rng)
    small = canvas.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
    return np.clip(small * 255 + 0.5, 0, 255).astype(np.uint8)


def rearranged(rng: Rng, scene: Scene) -> Scene:
    """The same words over another layout: new place, size, tilt and mirroring of every object."""
    sizes = SIZES[len(scene.things)]

    def again(thing: Thing) -> Thing:
        return dataclasses.replace(_thing(rng, thing.concept, *sizes, 0.0), tint=thing.tint)

    return dataclasses.replace(
        scene, things=_first_apart(lambda: tuple(map(again, scene.things)))
    )
