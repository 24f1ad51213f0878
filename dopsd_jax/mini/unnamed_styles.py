"""Styles without a name, which a network can only learn from a picture in its context.

Each pair of pictures whose caption has a spare word shares one such style, drawn at random: a
colour filter over a style of the world, or art in invented colours on an invented ground. No two
pairs share a style, so the networks learn to read a style from a picture instead of memorising it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dopsd_jax.mini import world

SPARE_WORDS = (
    "special", "secret", "mystery", "custom", "brand", "novel", "private", "fancy",
)
CONSONANTS, VOWELS = "bcdfghklmnprstvz", "aeiou"
Filter = Callable[[np.ndarray], np.ndarray]


def spare_word(rng: np.random.Generator) -> str:
    """The name of a style: one of SPARE_WORDS, or two or three made-up syllables."""
    if rng.uniform() < 0.5:
        return str(rng.choice(SPARE_WORDS))
    letters = [CONSONANTS, VOWELS] * int(rng.integers(2, 4))
    return "".join(str(rng.choice(list(kind))) for kind in letters)


def _two_colours(rng: np.random.Generator) -> np.ndarray:
    """float32 [2, 3] that differ by at least 1 in the sum of channels."""
    while True:
        ends = rng.uniform(0, 1, (2, 3)).astype(np.float32)
        if np.abs(ends[0] - ends[1]).sum() >= 1.0:
            return ends


def colour_filter(rng: np.random.Generator) -> Filter:
    """A duotone, an exchange of channels, an inversion or a tint: uint8 [.., 3] -> the same."""
    kind = rng.integers(4)
    if kind == 0:
        ends = _two_colours(rng)

        def recolour(x):
            y = np.clip((world.luminance(x) - 0.1) / 0.8, 0, 1)[..., None]
            return ends[0] * (1 - y) + ends[1] * y
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
            return (1 - share) * x + share * world.luminance(x)[..., None] * colour * 1.4

    def apply(pixels: np.ndarray) -> np.ndarray:
        x = recolour(pixels.astype(np.float32) / 255)
        return np.clip(x * 255 + 0.5, 0, 255).astype(np.uint8)

    return apply


def _ground(rng: np.random.Generator, a: np.ndarray, b: np.ndarray) -> Callable:
    """A ground of two colours: plain, a gradient, dots, bands, a chequer or blots."""
    kind, width = rng.integers(6), rng.uniform(0.08, 0.25)

    def ground(rng: np.random.Generator) -> np.ndarray:
        x, y = world.GRID_X + rng.uniform(), world.GRID_Y + rng.uniform()
        if kind == 0:
            weight = np.zeros_like(x)
        elif kind == 1:
            return world.gradient(rng, a, b)
        elif kind == 2:
            weight = np.hypot(x % width - width / 2, y % width - width / 2) < 0.25 * width
        elif kind == 3:
            weight = (x + y) / width % 2 < 1
        elif kind == 4:
            weight = (np.floor(x / width) + np.floor(y / width)) % 2
        else:
            weight = np.hypot(x % 1 - rng.uniform(), y % 1 - rng.uniform()) < 1.5 * width
        return world.mix(a, b, weight.astype(np.float32)).astype(np.float32)

    return ground


def _in_two_colours(dark: np.ndarray, light: np.ndarray) -> Callable:
    def draw(canvas, layer, tint, rng):
        shade = world.mix(dark, light, world.luminance(layer[..., :3]))
        return world.mix(canvas, shade, layer[..., 3])

    return draw


def _lines(colour: np.ndarray) -> Callable:
    def draw(canvas, layer, tint, rng):
        return world.mix(canvas, colour, layer[..., 3] * (1 - world.luminance(layer[..., :3])))

    return draw


def invented_style(rng: np.random.Generator) -> world.Style:
    """A training set's art in colours of its own, on a ground no style of the world has."""
    arts = sorted({world.STYLES[name].art for name in world.TRAINED_STYLES})
    art = str(rng.choice(arts))
    ground = rng.uniform(0, 1, 3).astype(np.float32)
    second = np.clip(ground + rng.uniform(-0.35, 0.35, 3), 0, 1).astype(np.float32)
    ink = rng.uniform(0, 1, 3).astype(np.float32)
    while np.abs(ink - ground).sum() < 1.0:
        ink = rng.uniform(0, 1, 3).astype(np.float32)
    if "contrast" in art:  # black line art
        draw = _lines(ink)
    else:
        ends = np.stack([ink, np.clip(ink + rng.uniform(-0.8, 0.8, 3), 0, 1)]).astype(np.float32)
        draw = _in_two_colours(*ends) if rng.uniform() < 0.7 else world.STYLES["noto"].draw
    return world.Style(art, _ground(rng, ground, second), draw)
