"""The finer levels of the image autoencoder's conv network by strips of rows, in little memory.

The same numbers as the blocks of models/vae.py on a whole picture, up to rounding in float32: a
strip is computed with the rows around it that its convolutions see, and the statistics of a
GroupNorm are those of the whole picture, gathered strip by strip before they are used. An array
that is too large to be kept is not: whoever needs rows of it computes them again, from the last
array that was kept. So a GroupNorm behind such arrays costs what computes its input once more.

Of the parameters, which are those of models/vae.py, this module only reads.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from dopsd_jax.models.layers import Dtype

WHOLE = 128 * 2**20  # bytes of the finest level's first width, up to which nothing goes by strips
KEPT = 2**30  # bytes up to which what a block puts out is kept; half as much for what is inside it
STRIP = 48 * 2**20  # bytes of the widest array of a strip, without the rows around it
HEAD = 8  # free rows at a kept picture's ends: a block that overwrites its input moves up by two

Stats = tuple[jax.Array, jax.Array, jax.Array]  # pixels seen; mean and squared deviations [groups]


@dataclasses.dataclass(frozen=True)
class Span:
    """Rows of a picture: `count` from `start` on, at most `out` of them above it, or below it."""

    start: jax.Array
    count: int
    out: int

    def wider(self, rows: int) -> Span:
        return Span(self.start - rows, self.count + 2 * rows, self.out + rows)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A picture [H, W, C] whose rows are read from memory or computed when they are asked for.

    Attributes:
        shape: (H, W, C).
        base: The kept array that rows are computed from.
        read: (base, span) -> [1, span.count, W, C]; rows outside the picture hold anything.
        bytes: Of one row of the widest array that is met on the way.
        first: Of a kept picture: the row of `base` that holds its row 0. None: it is not kept.
        stats: Of the groups of its GroupNorm, where they are known.
    """

    shape: tuple[int, int, int]
    base: jax.Array
    read: Callable[[jax.Array, Span], jax.Array]
    bytes: int
    first: int | None = None
    stats: Stats | None = None


def wanted(height: int, width: int, channels: int, dtype: Dtype) -> bool:
    """Whether a picture whose finest level is [height, width, channels] goes by strips."""
    return height * width * channels * jnp.dtype(dtype).itemsize > WHOLE


@dataclasses.dataclass(frozen=True)
class Strips:
    """The conv network's blocks; `groups` and `epsilon` of its GroupNorms, arrays in `dtype`."""

    groups: int
    epsilon: float
    dtype: Dtype
    fresh: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def encode(self, params, images: jax.Array) -> jax.Array:
        """conv_in and all down_blocks: [B, H, W, 3] -> [B, h, w, D], one picture at a time.

        Args:
            params: Of `Encoder`.
        """
        def one(image):
            x = self._settle(self._conv(params["conv_in"], _kept(image[None])), KEPT // 2)
            for block in _in_order(params, "down_blocks_"):
                x = self._resnets(block, x)
                if "downsamplers_0" in block:
                    x = self._settle(self._halve(block["downsamplers_0"], x), KEPT)
            return self._whole(x)

        return jax.lax.map(one, images)

    def decode(self, params, x: jax.Array) -> jax.Array:
        """All up_blocks and what follows: [B, h, w, D] -> [B, H, W, 3], one picture at a time.

        Args:
            params: Of `Decoder`.
        """
        def one(x):
            x = _kept(x[None])
            for block in _in_order(params, "up_blocks_"):
                x = self._resnets(block, x)
                if "upsamplers_0" in block:
                    x = self._settle(self._double(block["upsamplers_0"], x), KEPT // 2)
            return self._whole(self._conv(params["conv_out"], x, params["conv_norm_out"]))

        return jax.lax.map(one, x)

    def _resnets(self, params, x: Rows) -> Rows:
        for block in _in_order(params, "resnets_"):
            x = self._resnet(block, x)
        return x

    def _resnet(self, params, x: Rows) -> Rows:
        x = self._measured(x)
        h = self._settle(self._conv(params["conv1"], x, params["norm1"]), KEPT // 2)
        h = self._measured(h)

        def read(base, span):
            if h.first is None:  # computed from x, of which the outer rows are then for h alone
                outer = x.read(base, span.wider(2))
                inner = self._conv_rows(params["conv1"], outer, span.wider(2), x, params["norm1"])
                skipped = outer[:, 2:-2]
            else:
                inner, skipped = h.read(h.base, span.wider(1)), x.read(base, span)
            if "conv_shortcut" in params:
                skipped = self._product(params["conv_shortcut"], skipped)
            return skipped + self._conv_rows(
                params["conv2"], inner, span.wider(1), h, params["norm2"]
            )

        return self._settle(Rows(h.shape, x.base, read, max(x.bytes, h.bytes)), KEPT, over=x)

    def _conv(self, params, x: Rows, norm=None) -> Rows:
        """A convolution of 3 x 3, behind silu(norm(x)) where there is a norm."""
        if norm is not None:
            x = self._measured(x)
        H, W, _ = x.shape
        features = params["kernel"].shape[-1]

        def read(base, span):
            return self._conv_rows(params, x.read(base, span.wider(1)), span.wider(1), x, norm)

        return Rows((H, W, features), x.base, read, max(x.bytes, self._row_bytes(W, features)))

    def _double(self, params, x: Rows) -> Rows:
        """Every pixel four times, then a convolution."""
        H, W, D = x.shape

        def read(base, span):
            first = span.start // 2  # of x
            rows = x.read(base, Span(first, span.count // 2 + 1, span.out // 2 + 1))
            rows = jnp.repeat(jnp.repeat(rows, 2, axis=1), 2, axis=2)
            return jax.lax.dynamic_slice_in_dim(rows, span.start - 2 * first, span.count, axis=1)

        row_bytes = max(x.bytes // 2, self._row_bytes(2 * W, D))
        return self._conv(params, Rows((2 * H, 2 * W, D), x.base, read, row_bytes))

    def _halve(self, params, x: Rows) -> Rows:
        """A convolution of stride 2, which pads right and bottom only."""
        H, W, _ = x.shape
        features = params["kernel"].shape[-1]

        def read(base, span):
            wide = Span(2 * span.start, 2 * span.count + 1, 2 * span.out + 1)
            rows = _blank(x.read(base, wide), wide, H)
            return self._product(params, rows, stride=2, columns=(0, 1))

        row_bytes = max(2 * x.bytes, self._row_bytes(W // 2, features))
        return Rows((H // 2, W // 2, features), x.base, read, row_bytes)

    def _conv_rows(self, params, rows: jax.Array, span: Span, x: Rows, norm=None) -> jax.Array:
        """`rows` are the span of x; the outermost two are lost."""
        if norm is not None:
            rows = jax.nn.silu(self._normed(norm, rows, x.stats))
        return self._product(params, _blank(rows, span, x.shape[0]), columns=(1, 1))

    def _product(self, params, rows: jax.Array, stride: int = 1, columns=(0, 0)) -> jax.Array:
        rows, kernel, bias = (
            v.astype(self.dtype) for v in (rows, params["kernel"], params["bias"])
        )
        rows = jax.lax.conv_general_dilated(
            rows, kernel, (stride, stride), ((0, 0), columns),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return rows + bias

    def _normed(self, params, rows: jax.Array, stats: Stats) -> jax.Array:
        count, mean, squares = stats
        each = rows.shape[-1] // self.groups
        mean, variance = (jnp.repeat(v, each) for v in (mean, squares / count))
        factor = jax.lax.rsqrt(variance + self.epsilon) * params["scale"]
        return ((rows - mean) * factor + params["bias"]).astype(self.dtype)

    def _row_bytes(self, width: int, channels: int) -> int:
        return width * channels * jnp.dtype(self.dtype).itemsize

    def _measured(self, x: Rows) -> Rows:
        """x with its statistics."""
        if x.stats is not None:
            return x
        height, count = _strips(x)

        def strip(i, stats):
            rows = x.read(x.base, _span(x, height, i))
            return self._merged(stats, rows, x.shape[0] - i * height)

        return dataclasses.replace(x, stats=jax.lax.fori_loop(0, count, strip, self._nothing()))

    def _settle(self, x: Rows, limit: float, over: Rows | None = None) -> Rows:
        """x in memory, with its statistics, if it has at most `limit` bytes; else as it is.

        Args:
            over: What x is computed from, with at most two more rows above and below; it is
                overwritten where it has the shape of x.
        """
        H, W, C = x.shape
        if H * self._row_bytes(W, C) > limit:
            return x
        height, count = _strips(x)
        in_place = over is not None and over.shape == x.shape and (over.first or 0) >= 2
        if in_place:  # two rows higher, so that the strip below still finds the rows it sees
            target, first = over.base, over.first - 2
            missing = max(0, first + count * height - target.shape[1])
            target = jnp.pad(target, ((0, 0), (0, missing), (0, 0), (0, 0)))
        else:
            first = HEAD
            rows = first + count * height + HEAD
            # Of a number of its own that is not known before x.base is: else XLA makes the arrays
            # of all blocks at the start, or one of zeros that it keeps and copies every time.
            number = x.base[0, 0, 0, 0].astype(self.dtype) + next(self.fresh)
            target = jnp.full((1, rows, W, C), number)

        def strip(i, carry):
            target, stats = carry
            rows = x.read(target if in_place else x.base, _span(x, height, i))
            stats = self._merged(stats, rows, H - i * height)
            # Fused with what reads `target`, the write would be into a copy of it.
            target, rows = jax.lax.optimization_barrier((target, _row_major(rows)))
            at = first + i * height
            return jax.lax.dynamic_update_slice_in_dim(target, rows, at, axis=1), stats

        target, stats = jax.lax.fori_loop(0, count, strip, (target, self._nothing()))
        return _kept(target, first, H, stats)

    def _whole(self, x: Rows) -> jax.Array:
        """[H, W, C]."""
        x = x if x.first is not None else self._settle(x, float("inf"))
        return x.base[0, x.first : x.first + x.shape[0]]

    def _nothing(self) -> Stats:
        return jnp.float32(0), jnp.zeros(self.groups), jnp.zeros(self.groups)

    def _merged(self, stats: Stats, rows: jax.Array, left: jax.Array) -> Stats:
        """Statistics with those of the first `left` of some more rows.

        Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing
        sample variances, 1979.
        """
        _, height, W, C = rows.shape
        if C % self.groups:  # a picture, or moments: no GroupNorm follows
            return stats
        seen, mean, squares = stats
        x = rows.astype(jnp.float32).reshape(height, W, self.groups, -1)
        inside = (jnp.arange(height) < left)[:, None, None, None]
        more = jnp.minimum(left, height).astype(jnp.float32) * (W * C // self.groups)
        its_mean = jnp.sum(jnp.where(inside, x, 0), (0, 1, 3)) / more
        deviations = jnp.where(inside, x - its_mean[:, None], 0)
        total, apart = seen + more, its_mean - mean
        squares += jnp.sum(deviations**2, (0, 1, 3)) + apart**2 * (seen * more / total)
        return total, mean + apart * (more / total), squares


def _kept(array: jax.Array, first: int = 0, height: int = 0, stats: Stats | None = None) -> Rows:
    """A picture in memory: `height` rows of [1, .., W, C] from `first` on; 0: all of them."""
    _, there, W, C = array.shape

    height = height or there
    spare = min(first, there - first - height)

    def read(base, span):
        rows = _slice(base, first + span.start, span.count, max(0, span.out - spare))
        return jax.lax.optimization_barrier(_row_major(rows))

    shape = (height, W, C)
    return Rows(shape, array, read, W * C * array.dtype.itemsize, first, stats)


def _slice(array: jax.Array, start: jax.Array, count: int, out: int) -> jax.Array:
    """Rows of [1, H, W, C] from `start` on, of which `out` may be above the array, or below it."""
    if out:
        held = min(count, array.shape[1])
        first = jnp.clip(start, 0, array.shape[1] - held)
        array = jax.lax.dynamic_slice_in_dim(array, first, held, axis=1)
        # Rows in the array stay where they belong, where a slice would begin within it.
        array = jnp.pad(array, ((0, 0), (out, out), (0, 0), (0, 0)))
        start = start - first + out
    return jax.lax.dynamic_slice_in_dim(array, start, count, axis=1)


def _row_major(rows: jax.Array) -> jax.Array:
    if rows.shape[-1] < 8:
        return rows
    return with_layout_constraint(rows, Layout((0, 1, 2, 3)))


def _blank(rows: jax.Array, span: Span, height: int) -> jax.Array:
    """Zeros for rows outside the picture, as a convolution pads it."""
    index = span.start + jnp.arange(span.count)
    inside = (index >= 0) & (index < height)
    return jnp.where(inside[:, None, None], rows, jnp.zeros((), rows.dtype))


def _strips(x: Rows) -> tuple[int, int]:
    """Rows of a strip, and how many strips; the last may reach a little beyond the picture."""
    H = x.shape[0]
    most = max(1, min(H, STRIP // x.bytes))
    height = min(range(most, most // 2, -1), key=lambda height: -H % height)
    return height, -(-H // height)


def _span(x: Rows, height: int, i: jax.Array) -> Span:
    """The strip i."""
    return Span(i * height, height, -x.shape[0] % height)


def _in_order(params, prefix: str) -> list:
    names = [name for name in params if name.startswith(prefix)]
    return [params[name] for name in sorted(names, key=lambda name: int(name[len(prefix):]))]
