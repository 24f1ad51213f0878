"""The styles of the mini world: an art, a ground, a way of drawing on it, and a finish.

Grounds, drawings and finishes are made from the same few operations, from which
`unnamed_styles` also invents styles that have no name. The held-out styles differ from the trained
ones in kind: in their line, texture, palette or ground.
"""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

SIZE = 64               # pixels per side of a scene
CANVAS = 2 * SIZE       # scenes are drawn at twice the size and box-filtered down
Rng = np.random.Generator
Canvas = np.ndarray     # float32 [CANVAS, CANVAS, 3] in [0, 1]
Layer = np.ndarray      # float32 [CANVAS, CANVAS, 4] in [0, 1], straight alpha: a placed sprite
Colour = np.ndarray     # float32 [3]
Draw = Callable[[Canvas, Layer, "tuple | None", Rng], Canvas]
GRID_Y, GRID_X = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) / CANVAS
WHITE = np.ones(3, np.float32)


@dataclasses.dataclass(frozen=True)
class Style:
    """A style: which set it draws, on which ground, and how.

    Attributes:
        art: Name of the emoji set.
        ground: rng -> Canvas.
        draw: (canvas, layer, tint or None, rng) -> canvas, for one object after the other.
        finish: (canvas, rng) -> canvas, for the whole picture, or None.
    """

    art: str
    ground: Callable[[Rng], Canvas]
    draw: Draw
    finish: Callable[[Canvas, Rng], Canvas] | None = None


# Colours.


def hsv(h: float, s: float, v: float) -> Colour:
    return np.asarray(colorsys.hsv_to_rgb(h % 1.0, s, v), np.float32)


def luminance(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.asarray([0.299, 0.587, 0.114], np.float32)


def mix(a, b, weight: np.ndarray) -> Canvas:
    """a where the weight [..] is 0, b where it is 1."""
    return a * (1 - weight[..., None]) + b * weight[..., None]


def ramp(colours: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Colours [n, 3] at equal distances on [0, 1], interpolated at `along` [..]: [.., 3]."""
    at = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(along, at, c) for c in np.asarray(colours).T], -1).astype(np.float32)


def tinted(rgb: np.ndarray, tint) -> np.ndarray:
    """Colours of a sprite, most of them replaced by shades of a tint."""
    if tint is None:
        return rgb
    shade = np.clip(luminance(rgb)[..., None] * 0.75 + 0.3, 0, 1)
    return 0.2 * rgb + 0.8 * np.clip(shade * np.asarray(tint, np.float32) * 1.2, 0, 1)


# Grounds.


def along(rng: Rng) -> np.ndarray:
    """A coordinate in a random direction, about [0, 1] over the canvas."""
    angle = rng.uniform(0, 2 * np.pi)
    return (GRID_X - 0.5) * np.cos(angle) + (GRID_Y - 0.5) * np.sin(angle) + 0.5


def gradient(rng: Rng, a, b) -> Canvas:
    return mix(a, b, np.clip(along(rng), 0, 1)).astype(np.float32)


def noise(rng: Rng, cells: int) -> np.ndarray:
    """Smooth noise of about `cells` blots per side: float32 [CANVAS, CANVAS] in [0, 1]."""
    coarse = Image.fromarray(rng.uniform(0, 255, (cells, cells)).astype(np.uint8))
    fine = coarse.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    return np.asarray(fine, np.float32) / 255


def dots(width: float, share: float, rng: Rng, angle: float = 0.0) -> np.ndarray:
    """Round dots on a square lattice: float32 [CANVAS, CANVAS], 1 in a dot."""
    c, s = np.cos(angle), np.sin(angle)
    x = (GRID_X * c + GRID_Y * s + rng.uniform()) % width - width / 2
    y = (GRID_Y * c - GRID_X * s + rng.uniform()) % width - width / 2
    return (np.hypot(x, y) < share * width).astype(np.float32)


def lines(width: float, share: float, rng: Rng, angle: float) -> np.ndarray:
    """Parallel lines: float32 [CANVAS, CANVAS], 1 in a line, which takes `share` of `width`."""
    x = GRID_X * np.cos(angle) + GRID_Y * np.sin(angle) + rng.uniform()
    return (x % width < share * width).astype(np.float32)


def rays(count: int, rng: Rng) -> np.ndarray:
    """A sunburst around a point near the middle: float32 [CANVAS, CANVAS], every other ray 1."""
    x, y = GRID_X - rng.uniform(0.35, 0.65), GRID_Y - rng.uniform(0.35, 0.65)
    turn = np.arctan2(y, x) / (2 * np.pi) + rng.uniform()
    return (np.floor(turn * 2 * count) % 2).astype(np.float32)


def _soft(rng: Rng) -> Canvas:
    """Two light hues run into each other."""
    h = rng.uniform()
    return gradient(rng, hsv(h, rng.uniform(0.1, 0.35), 0.97),
                    hsv(h + rng.uniform(-0.3, 0.3), rng.uniform(0.2, 0.5), 0.92))


def _stripes(rng: Rng) -> Canvas:
    """Vivid stripes of two shades of one hue."""
    h = rng.uniform()
    weight = lines(rng.uniform(0.24, 0.6), 0.5, rng, rng.uniform(0, np.pi))
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


def _halftone(rng: Rng) -> Canvas:
    """A bright ground under large dots of a neighbouring hue."""
    h = rng.choice([0.0, 0.13, 0.55, 0.8]) + rng.uniform(-0.03, 0.03)
    weight = dots(rng.uniform(0.09, 0.13), 0.3, rng, np.pi / 4)
    return mix(hsv(h, 0.25, 1.0), hsv(h, 0.7, 0.95), weight)


def _sky(rng: Rng) -> Canvas:
    """A flat sky over a flat meadow."""
    horizon = rng.uniform(0.55, 0.85)
    return mix(hsv(rng.uniform(0.5, 0.58), 0.45, 0.98), hsv(rng.uniform(0.25, 0.38), 0.6, 0.75),
               (horizon < GRID_Y).astype(np.float32))


def _ruled(rng: Rng) -> Canvas:
    """White exercise paper with pale lines across."""
    weight = lines(rng.uniform(0.1, 0.14), 0.12, rng, np.pi / 2)
    return mix(0.98 * WHITE, hsv(0.58, 0.25, 0.9), weight)


def _burst(rng: Rng) -> Canvas:
    """Orange and cream rays."""
    h = rng.uniform(0.05, 0.12)
    return mix(hsv(h, 0.25, 0.98), hsv(h - 0.02, 0.7, 0.95), rays(int(rng.integers(7, 12)), rng))


def _grid(rng: Rng) -> Canvas:
    """Blueprint paper: blue with a fine lighter grid."""
    base = hsv(rng.uniform(0.58, 0.63), 0.85, rng.uniform(0.55, 0.75))
    step, oy, ox = int(rng.integers(14, 24)), *rng.integers(0, 14, 2)
    i = np.arange(CANVAS)
    weight = ((i + oy) % step < 2)[:, None] | ((i + ox) % step < 2)[None]
    return mix(base, WHITE, weight * np.float32(0.25))


def _tan(rng: Rng) -> Canvas:
    """Old paper, darker towards the rim."""
    base = hsv(rng.uniform(0.09, 0.12), 0.35, rng.uniform(0.85, 0.93))
    d = np.hypot(GRID_X - 0.5, GRID_Y - 0.5)
    return mix(base, base * 0.7, np.clip(d * 1.3, 0, 1) ** 2)


def _board(rng: Rng) -> Canvas:
    """A blackboard, wiped with a dry sponge."""
    base = hsv(rng.uniform(0.36, 0.42), 0.45, rng.uniform(0.2, 0.3))
    return mix(base, base + 0.16, noise(rng, 5) * noise(rng, 24))


def _glass(rng: Rng) -> Canvas:
    """Panes of coloured glass: the nearest of some random points decides."""
    points = rng.uniform(-0.1, 1.1, (14, 2)).astype(np.float32)
    d = np.hypot(GRID_X[..., None] - points[:, 0], GRID_Y[..., None] - points[:, 1])
    first, second = np.sort(d, -1)[..., :2].transpose(2, 0, 1)
    panes = np.stack([hsv(h, 0.55, 0.95) for h in rng.uniform(size=len(points))])
    canvas = panes[d.argmin(-1)]
    return mix(canvas, 0.08 * WHITE, (second - first < 0.025).astype(np.float32))


def _bricks(rng: Rng) -> Canvas:
    """A wall of bricks."""
    y = GRID_Y * 5 + rng.uniform()
    x = GRID_X * 2.5 + 0.5 * (np.floor(y) % 2) + rng.uniform()
    joint = (y % 1 < 0.14) | (x % 1 < 0.07)
    shade = hsv(rng.uniform(0.0, 0.04), 0.6, 0.62)
    return mix(shade * (0.88 + 0.24 * noise(rng, 10)[..., None]), hsv(0.06, 0.25, 0.75),
               joint.astype(np.float32))


def _linen(rng: Rng) -> Canvas:
    """Woven cloth."""
    base = hsv(rng.uniform(0.08, 0.14), 0.12, 0.93)
    weave = (np.floor(GRID_X * 32) + np.floor(GRID_Y * 32)) % 2
    return mix(base, 0.93 * base, weave.astype(np.float32))


def _newsprint(rng: Rng) -> Canvas:
    """Grey-yellow paper with an even grain."""
    base = hsv(0.13, rng.uniform(0.12, 0.2), 0.94)
    return base * (0.94 + 0.08 * rng.uniform(size=(CANVAS, CANVAS, 1)).astype(np.float32))


def _cold(rng: Rng) -> Canvas:
    """What a thermal camera sees of a cold room."""
    return thermal(0.22 * noise(rng, 4))


# Ways of drawing. `layer` is the placed sprite; a tint is a colour that the caption tells.


def filtered(alpha: np.ndarray, kernel) -> np.ndarray:
    """A PIL filter of a mask in [0, 1]."""
    image = Image.fromarray((np.clip(alpha, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(kernel), np.float32) / 255


def darkness(layer: Layer) -> np.ndarray:
    """How dark the sprite is where it covers: the lines of line art."""
    return layer[..., 3] * (1 - luminance(layer[..., :3]))


def rim(layer: Layer, width: int) -> np.ndarray:
    """The sprite's shape, grown by about half of an odd `width`: a mask."""
    return filtered(filtered(layer[..., 3], ImageFilter.MaxFilter(width)),
                    ImageFilter.GaussianBlur(0.7))


def edges(layer: Layer, gain: float = 4.0) -> np.ndarray:
    """The outlines of a coloured sprite, inner ones too: a mask."""
    grey = mix(WHITE, layer[..., :3], layer[..., 3])
    grey = filtered(luminance(grey), ImageFilter.GaussianBlur(1.0))
    down, right = np.gradient(grey)
    return np.clip(gain * np.hypot(down, right) * 2, 0, 1)


def _plain(canvas, layer, tint, rng) -> Canvas:
    return mix(canvas, tinted(layer[..., :3], tint), layer[..., 3])


def _sticker(canvas, layer, tint, rng) -> Canvas:
    edge = rim(layer, 9)
    shadow = np.roll(filtered(edge, ImageFilter.GaussianBlur(3)), (4, 4), (0, 1))
    canvas = canvas * (1 - 0.45 * shadow[..., None])
    return _plain(mix(canvas, WHITE, edge), layer, tint, rng)


def _ink(canvas, layer, tint, rng) -> Canvas:
    colour = np.asarray(tint or (0.08, 0.08, 0.14), np.float32) * (0.75 if tint else 1.0)
    return mix(canvas, colour, darkness(layer))


def _neon(canvas, layer, tint, rng) -> Canvas:
    colour = np.asarray(tint or hsv(rng.uniform(), 0.75, 1.0), np.float32)
    line = darkness(layer)
    glow = filtered(line, ImageFilter.GaussianBlur(6))[..., None] * colour
    return np.clip(mix(canvas + 0.8 * glow, 0.35 + 0.65 * colour, line), 0, 1)


def _moonlit(canvas, layer, tint, rng) -> Canvas:
    rgb = tinted(layer[..., :3], tint)
    rgb = 0.75 * rgb * np.asarray([0.75, 0.85, 1.1], np.float32) + np.asarray(
        [0.02, 0.03, 0.15], np.float32
    )
    return mix(canvas, np.clip(rgb, 0, 1), layer[..., 3])


def _pastel(canvas, layer, tint, rng) -> Canvas:
    return mix(canvas, 0.45 * tinted(layer[..., :3], tint) + 0.55, 0.92 * layer[..., 3])


def _comic(canvas, layer, tint, rng) -> Canvas:
    canvas = mix(canvas, np.zeros(3, np.float32), rim(layer, 7))
    flat = np.round(tinted(layer[..., :3], tint) * 3) / 3
    return mix(canvas, flat, layer[..., 3])


def _pencil(canvas, layer, tint, rng) -> Canvas:
    colour = np.asarray(tint or (0.25, 0.25, 0.28), np.float32)
    hatch = lines(0.035, 0.5, rng, np.pi / 4)
    shade = 0.6 * hatch * darkness(layer)
    return mix(mix(canvas, colour, shade), colour, edges(layer))


def _poster(canvas, layer, tint, rng) -> Canvas:
    end = np.asarray(tint, np.float32) * 0.9 if tint else np.asarray([0.1, 0.45, 0.5], np.float32)
    scale = np.stack([0.25 * end, 0.7 * end, end, 0.3 * end + 0.68])
    level = np.floor(np.clip(luminance(layer[..., :3]), 0, 0.999) * 4) / 3
    return mix(canvas, ramp(scale, level), layer[..., 3])


def _white(canvas, layer, tint, rng) -> Canvas:
    colour = np.asarray(tint, np.float32) * 0.4 + 0.6 if tint else WHITE
    return mix(canvas, colour, 0.95 * darkness(layer))


def _sepia(canvas, layer, tint, rng) -> Canvas:
    dark, light = np.asarray([0.25, 0.13, 0.05]), np.asarray([0.9, 0.75, 0.5])
    rgb = mix(dark, light, luminance(layer[..., :3]) ** 1.2).astype(np.float32)
    return mix(canvas, rgb, layer[..., 3])


def _chalk(canvas, layer, tint, rng) -> Canvas:
    colour = np.asarray(tint, np.float32) * 0.5 + 0.45 if tint else np.asarray([0.95, 0.95, 0.9])
    grain = 0.4 + 0.6 * noise(rng, 40)
    return mix(canvas, colour, darkness(layer) * grain).astype(np.float32)


def _leaded(canvas, layer, tint, rng) -> Canvas:
    canvas = mix(canvas, 0.08 * WHITE, rim(layer, 7))
    vivid = np.clip(1.3 * tinted(layer[..., :3], tint) ** 1.4, 0, 1)
    return mix(mix(canvas, vivid, layer[..., 3]), 0.08 * WHITE, edges(layer, 3.0) * layer[..., 3])


def _sprayed(canvas, layer, tint, rng) -> Canvas:
    colour = np.asarray(tint or (0.97, 0.97, 0.95), np.float32)
    mist = filtered(layer[..., 3], ImageFilter.GaussianBlur(5))
    canvas = mix(canvas, colour, 0.3 * mist)
    return mix(canvas, colour, 0.92 * darkness(layer)).astype(np.float32)


def thermal(heat: np.ndarray) -> np.ndarray:
    """The palette of a thermal camera: black, blue, magenta, orange, yellow, white."""
    return ramp(np.asarray([(0, 0, 0.1), (0.1, 0, 0.5), (0.6, 0, 0.6), (0.95, 0.35, 0.1),
                            (1, 0.85, 0.1), (1, 1, 0.9)], np.float32), heat)


def _hot(canvas, layer, tint, rng) -> Canvas:
    heat = 0.42 + 0.55 * luminance(layer[..., :3])
    glow = filtered(layer[..., 3], ImageFilter.GaussianBlur(4))
    canvas = mix(canvas, thermal(np.float32(0.3)), 0.7 * glow)
    return mix(canvas, thermal(heat), layer[..., 3])


def _two_inks(canvas, layer, tint, rng) -> Canvas:
    """Two transparent inks, dots for middle tones, one plate a little beside the other."""
    grey, alpha = luminance(layer[..., :3]), layer[..., 3]
    dy, dx = rng.integers(2, 4, 2) * rng.choice([-1, 1], 2)
    tone = np.maximum((grey < 0.35), (grey < 0.7) * dots(0.035, 0.42, rng, np.pi / 4)) * alpha
    blue = mix(WHITE, np.asarray([0.15, 0.3, 0.75], np.float32), tone.astype(np.float32))
    pink = mix(WHITE, np.asarray([1.0, 0.35, 0.5], np.float32), np.roll(alpha, (dy, dx), (0, 1)))
    return (canvas * pink * blue).astype(np.float32)


# Finishes.


def blocks(canvas: Canvas, side: int) -> Canvas:
    """The mean of every square of side x side canvas pixels."""
    n = CANVAS // side
    small = canvas[: n * side, : n * side].reshape(n, side, n, side, 3).mean((1, 3))
    return np.repeat(np.repeat(small, side, 0), side, 1)


def _pixels(canvas: Canvas, rng: Rng) -> Canvas:
    """Squares of two pixels in 5 levels per channel."""
    return np.round(blocks(canvas, 4) * 4) / 4


def _stitches(canvas: Canvas, rng: Rng) -> Canvas:
    """Squares of four pixels, each a cross of thread."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] % 8
    thread = (np.abs(y - x) <= 1) | (np.abs(y + x - 7) <= 1)
    return blocks(canvas, 8) * np.where(thread, 1.03, 0.92)[..., None].astype(np.float32)


STYLES: dict[str, Style] = {
    "noto": Style("noto", _soft, _plain),
    "sticker": Style("twemoji", _stripes, _sticker),
    "ink": Style("fluent-emoji-high-contrast", _paper, _ink),
    "neon": Style("fluent-emoji-high-contrast", _dark, _neon),
    "night": Style("noto-v1", _night, _moonlit),
    "pastel": Style("fluent-emoji-flat", _cream, _pastel),
    "comic": Style("fluent-emoji-flat", _halftone, _comic),
    "pixel": Style("twemoji", _sky, _plain, _pixels),
    "pencil": Style("noto", _ruled, _pencil),
    "poster": Style("noto-v1", _burst, _poster),
    "blueprint": Style("emojione-monotone", _grid, _white),
    "sepia": Style("emojione", _tan, _sepia),
    "chalk": Style("emojione-monotone", _board, _chalk),
    "glass": Style("emojione", _glass, _leaded),
    "stencil": Style("fluent-emoji-high-contrast", _bricks, _sprayed),
    "thermal": Style("noto", _cold, _hot),
    "stitch": Style("twemoji", _linen, _plain, _stitches),
    "riso": Style("fluent-emoji-flat", _newsprint, _two_inks),
}
# In no training picture. The first four are also drawn from sets that no training picture shows.
HELD_OUT_STYLES = (
    "blueprint", "sepia", "chalk", "glass", "stencil", "thermal", "stitch", "riso",
)
TRAINED_STYLES = tuple(s for s in STYLES if s not in HELD_OUT_STYLES)
