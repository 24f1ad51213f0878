"""Styles without a name, which a network can only learn from a picture in its context.

Each pair of pictures whose caption has a spare word shares one such style, drawn at random: a
colour filter over a style of the world, or art drawn in an invented way and in invented colours on
an invented ground. No two pairs share a style, so the networks learn to read a style from a picture
instead of memorising it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import ImageFilter

from dopsd_jax.mini import styles
from dopsd_jax.mini.styles import CANVAS, GRID_X, GRID_Y, Canvas, Colour, Draw, Rng

SPARE_WORDS = (
    "special", "secret", "mystery", "custom", "brand", "novel", "private", "fancy",
)
CONSONANTS, VOWELS = "bcdfghklmnprstvz", "aeiou"
Filter = Callable[[np.ndarray], np.ndarray]


def spare_word(rng: Rng) -> str:
    """The name of a style: one of SPARE_WORDS, or two or three made-up syllables."""
    if rng.uniform() < 0.5:
        return str(rng.choice(SPARE_WORDS))
    letters = [CONSONANTS, VOWELS] * int(rng.integers(2, 4))
    return "".join(str(rng.choice(list(kind))) for kind in letters)


def _colour(rng: Rng) -> Colour:
    return rng.uniform(0, 1, 3).astype(np.float32)


def _near(rng: Rng, colour: Colour, by: float) -> Colour:
    """A colour whose channels differ from another's by at most `by`."""
    return np.clip(colour + rng.uniform(-by, by, 3), 0, 1).astype(np.float32)


def _against(rng: Rng, colour: Colour) -> Colour:
    """A colour that differs from another by at least 1 in the sum of channels."""
    while True:
        other = _colour(rng)
        if np.abs(other - colour).sum() >= 1.0:
            return other


def colour_filter(rng: Rng) -> Filter:
    """A duotone, an exchange of channels, an inversion or a tint: uint8 [.., 3] -> the same."""
    kind = rng.integers(4)
    if kind == 0:
        dark = _colour(rng)
        light = _against(rng, dark)

        def recolour(x):
            y = np.clip((styles.luminance(x) - 0.1) / 0.8, 0, 1)
            return styles.mix(dark, light, y)
    elif kind == 1:
        order = rng.permutation(3)

        def recolour(x):
            return x[..., order]
    elif kind == 2:
        order = rng.permutation(3)

        def recolour(x):
            return 1 - x[..., order]
    else:
        colour = rng.uniform(0.1, 1, 3).astype(np.float32)
        share = rng.uniform(0.4, 0.8)

        def recolour(x):
            return (1 - share) * x + share * styles.luminance(x)[..., None] * colour * 1.4

    def apply(pixels: np.ndarray) -> np.ndarray:
        x = recolour(pixels.astype(np.float32) / 255)
        return np.clip(x * 255 + 0.5, 0, 255).astype(np.uint8)

    return apply


def _pattern(rng: Rng) -> Callable[[Rng], np.ndarray]:
    """rng -> float32 [CANVAS, CANVAS] in [0, 1]: where a ground has its second colour."""
    kind, width, angle = rng.integers(11), rng.uniform(0.08, 0.25), rng.uniform(0, np.pi)
    share, count = rng.uniform(0.15, 0.5), int(rng.integers(5, 13))

    def chequer(rng: Rng) -> np.ndarray:
        x, y = GRID_X + rng.uniform(), GRID_Y + rng.uniform()
        return (np.floor(x / width) + np.floor(y / width)) % 2

    def blots(rng: Rng) -> np.ndarray:
        x, y = GRID_X % 1 - rng.uniform(), GRID_Y % 1 - rng.uniform()
        return np.hypot(x, y) < 1.5 * width

    def mesh(rng: Rng) -> np.ndarray:
        across, down = (styles.lines(width, 0.15, rng, a) for a in (0, np.pi / 2))
        return np.maximum(across, down)

    def waves(rng: Rng) -> np.ndarray:
        y = GRID_Y + 0.25 * width * np.sin(2 * np.pi * GRID_X / width) + rng.uniform()
        return y % width < share * width

    def horizon(rng: Rng) -> np.ndarray:
        return rng.uniform(0.4, 0.8) < GRID_Y

    def vignette(rng: Rng) -> np.ndarray:
        return np.clip(1.4 * np.hypot(GRID_X - 0.5, GRID_Y - 0.5), 0, 1) ** 2

    return (
        lambda rng: np.zeros((CANVAS, CANVAS)),
        lambda rng: np.clip(styles.along(rng), 0, 1),
        lambda rng: styles.dots(0.7 * width, 0.6 * share, rng, angle),
        lambda rng: styles.lines(width, share, rng, angle),
        lambda rng: styles.rays(count, rng),
        lambda rng: styles.noise(rng, count),
        chequer, blots, mesh, waves, (horizon, vignette)[rng.integers(2)],
    )[kind]


def _ground(rng: Rng, a: Colour, b: Colour) -> Callable[[Rng], Canvas]:
    pattern = _pattern(rng)
    return lambda rng: styles.mix(a, b, pattern(rng).astype(np.float32)).astype(np.float32)


def _shades(rng: Rng, ink: Colour) -> Draw:
    """Two to four colours in place of the art's shades, smoothly or in steps."""
    scale = np.stack([ink, *(_near(rng, ink, 0.8) for _ in range(rng.integers(1, 4)))])
    steps = int(rng.choice([0, 3, 4]))

    def draw(canvas, layer, tint, rng):
        level = styles.luminance(layer[..., :3])
        if steps:
            level = np.floor(np.clip(level, 0, 0.999) * steps) / (steps - 1)
        return styles.mix(canvas, styles.ramp(scale, level), layer[..., 3])

    return draw


def _own_colours(rng: Rng, ink: Colour) -> Draw:
    """The art's colours, paler, darker or as they are, and perhaps through each other."""
    low, high = rng.choice([0.0, 0.0, 0.3, 0.5]), rng.choice([1.0, 1.0, 0.75])
    alpha, steps = rng.choice([1.0, 1.0, 0.8]), int(rng.choice([0, 0, 3]))

    def draw(canvas, layer, tint, rng):
        rgb = np.round(layer[..., :3] * steps) / steps if steps else layer[..., :3]
        return styles.mix(canvas, low + (high - low) * rgb, alpha * layer[..., 3])

    return draw


def _outlines(rng: Rng, ink: Colour) -> Draw:
    """Outlines of coloured art, with or without hatching."""
    hatch, width, angle = rng.uniform(0, 0.7), rng.uniform(0.03, 0.05), rng.uniform(0, np.pi)

    def draw(canvas, layer, tint, rng):
        shade = hatch * styles.lines(width, 0.5, rng, angle) * styles.darkness(layer)
        return styles.mix(styles.mix(canvas, ink, shade), ink, styles.edges(layer))

    return draw


def _line_art(rng: Rng, ink: Colour) -> Draw:
    """The lines of line art, plain, glowing or grainy."""
    glow = rng.choice([0.0, 0.0, rng.uniform(0.4, 0.9)])
    grain = rng.choice([0.0, 0.0, rng.uniform(0.2, 0.5)])

    def draw(canvas, layer, tint, rng):
        line = styles.darkness(layer)
        if glow:
            halo = styles.filtered(line, ImageFilter.GaussianBlur(6))[..., None] * ink
            canvas = np.clip(canvas + glow * halo, 0, 1)
        return styles.mix(canvas, ink, line * (1 - grain * styles.noise(rng, 48)))

    return draw


def _rimmed(rng: Rng, draw: Draw, colour: Colour) -> Draw:
    """The same with a rim around the object, or with its shadow."""
    width, shadow = int(rng.choice([5, 7, 9])), rng.uniform() < 0.4

    def rimmed(canvas, layer, tint, rng):
        mask = styles.rim(layer, width)
        if shadow:
            mask = 0.5 * np.roll(mask, (5, 5), (0, 1))
        return draw(styles.mix(canvas, colour, mask), layer, tint, rng)

    return rimmed


def _finish(rng: Rng) -> Callable[[Canvas, Rng], Canvas] | None:
    """Mostly nothing; else coarse pixels, fine scan lines, grain, or darker corners."""
    kind, amount = rng.integers(10), rng.uniform(0.1, 0.3)
    side = int(rng.choice([4, 8]))
    if kind == 0:
        return lambda canvas, rng: styles.blocks(canvas, side)
    if kind == 1:
        def scan(canvas: Canvas, rng: Rng) -> Canvas:
            return canvas * (1 - amount * styles.lines(0.0625, 0.5, rng, np.pi / 2)[..., None])
        return scan
    if kind == 2:
        return lambda canvas, rng: canvas * (1 - amount * styles.noise(rng, 48)[..., None])
    if kind == 3:
        d = np.hypot(GRID_X - 0.5, GRID_Y - 0.5)[..., None]
        return lambda canvas, rng: canvas * (1 - 1.5 * amount * d)
    return None


def invented_style(rng: Rng) -> styles.Style:
    """A training set's art, drawn in a way and in colours of its own on a ground of its own."""
    arts = sorted({styles.STYLES[name].art for name in styles.TRAINED_STYLES})
    art = str(rng.choice(arts))
    ground = _colour(rng)
    second, ink = _near(rng, ground, 0.4), _against(rng, ground)
    if "contrast" in art:  # black line art
        draw = _line_art(rng, ink)
    else:
        kinds = (_shades, _own_colours, _outlines)
        draw = kinds[rng.choice(len(kinds), p=[0.5, 0.3, 0.2])](rng, ink)
        if rng.uniform() < 0.35:
            draw = _rimmed(rng, draw, rng.choice([np.zeros(3), np.ones(3), _colour(rng)]))
    return styles.Style(art, _ground(rng, ground, second), draw, _finish(rng))
