"""Qwen3-VL around a Qwen3 text encoder: vision tower, DeepStack, interleaved M-RoPE.

The language weights are the pipeline's own text encoder; only the rope base and the position rule
are Qwen3-VL's, as the published code combines them.

Source: transformers `Qwen3VLModel` and Qwen/Qwen3-VL-4B-Instruct.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core.checks import (
    COUNT,
    INDEX,
    OBJECT,
    Kind,
    check_shapes,
    list_of,
    value_problems,
)
from dopsd_jax.models.attention import attention
from dopsd_jax.models.layers import Dense, Dtype, LayerNorm, ParamNames, parameter
from dopsd_jax.models.qwen3 import Qwen3, inverse_frequencies, record, rope_theta, rope_values
from dopsd_jax.models.rope import rotate_half

VISION_ROPE_THETA = 10000.0
NORM_EPS = 1e-6
NAMES = ParamNames(columns=("linear_fc1",), rows=("linear_fc2",), whole=("pos_embed",))
STACKS = ("blocks",)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Architecture numbers of the vision tower, under the names of its config.json."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]

    @classmethod
    def qwen3_vl_4b(cls) -> VisionConfig:
        """The tower of Qwen3-VL-4B-Instruct: 415,347,712 parameters."""
        return cls(24, 1024, 4096, 16, 3, 16, 2, 2, 2560, 2304, (5, 11, 17))

    @classmethod
    def from_json(cls, values: dict) -> VisionConfig:
        """From the vision_config of a Qwen3-VL config.json.

        Raises:
            ValueError: Every missing, impossible or unsupported value, together.
        """
        fields = [f.name for f in dataclasses.fields(cls)]
        indexes_kind = Kind("a list of layers", lambda x: x == [] or list_of(INDEX).holds(x))
        kinds = dict.fromkeys(fields, COUNT) | {"deepstack_visual_indexes": indexes_kind}
        wrong = value_problems({k: v for k, v in values.items() if v is not None}, kinds)
        problems = list(wrong.values())
        if values.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            problems.append(
                f"hidden_act: only 'gelu_pytorch_tanh' is supported, got {values['hidden_act']!r}"
            )
        rope, more = rope_values(values)
        problems += more
        if rope.get("rope_theta", VISION_ROPE_THETA) != VISION_ROPE_THETA:
            problems.append(f"rope_theta: expected {VISION_ROPE_THETA}, got {rope['rope_theta']}")
        if not wrong:
            problems += _break_vision(values)
        if problems:
            raise ValueError("Qwen3-VL vision config: " + "; ".join(problems))
        indexes = {"deepstack_visual_indexes": tuple(values["deepstack_visual_indexes"])}
        return cls(**{f: values[f] for f in fields} | indexes)

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_dim(self) -> int:
        return self.hidden_size * self.spatial_merge_size**2


def _break_vision(values: dict) -> list[str]:
    """How the numbers of a vision_config do not go together."""
    problems = []
    indexes, depth = values["deepstack_visual_indexes"], values["depth"]
    if list(indexes) != sorted(set(indexes)):
        problems.append(f"deepstack_visual_indexes: expected ascending, got {indexes}")
    if indexes and max(indexes) >= depth:
        problems.append(
            f"deepstack_visual_indexes: expected layers below depth = {depth}, got {indexes}"
        )
    if values["hidden_size"] % (4 * values["num_heads"]):
        problems.append(
            f"hidden_size: expected a multiple of 4 num_heads = {4 * values['num_heads']}, got "
            f"{values['hidden_size']}"
        )
    positions = values["num_position_embeddings"]
    if math.isqrt(positions) ** 2 != positions:
        problems.append(f"num_position_embeddings: expected a square number, got {positions}")
    return problems


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """What Qwen3-VL adds to its language model."""

    vision: VisionConfig
    image_token_id: int
    mrope_section: tuple[int, int, int]
    rope_theta: float

    @classmethod
    def qwen3_vl_4b(cls) -> Qwen3VLConfig:
        return cls(VisionConfig.qwen3_vl_4b(), 151655, (24, 20, 20), 5e6)

    @classmethod
    def from_json(cls, values: dict) -> Qwen3VLConfig:
        """From the config.json of a Qwen3-VL checkpoint.

        Raises:
            ValueError: Every missing, impossible or unsupported value outside the vision_config,
                together.
        """
        missing = [k for k in ("vision_config", "text_config", "image_token_id") if k not in values]
        if missing:
            raise ValueError(f"Qwen3-VL config: missing {missing}; is this a Qwen3-VL checkpoint?")
        problems = list(value_problems(values, {
            "vision_config": OBJECT, "text_config": OBJECT, "image_token_id": INDEX,
        }).values())
        text = values["text_config"]
        text = text if OBJECT.holds(text) else {}
        theta, more = rope_theta(text)
        rope, _ = rope_values(text)
        problems += more
        if not rope.get("mrope_interleaved"):
            problems.append("mrope_interleaved: only true is supported")
        section, head_dim = rope.get("mrope_section"), text.get("head_dim")
        if not list_of(COUNT, 3).holds(section):
            problems.append(f"mrope_section: expected 3 numbers, got {section!r:.60}")
        elif head_dim is not None and head_dim != 2 * sum(section):
            problems.append(
                f"mrope_section: expected numbers whose sum is half of head_dim = {head_dim!r:.20}"
                f", got {section}"
            )
        if problems:
            raise ValueError("Qwen3-VL config: " + "; ".join(problems))
        vision = VisionConfig.from_json(values["vision_config"])
        return cls(vision, values["image_token_id"], tuple(rope["mrope_section"]), theta)


def block_major(grid: tuple[int, int], merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each patch; patches that will be merged follow one another."""
    gh, gw = grid
    rows, cols = np.divmod(np.arange(gh * gw).reshape(gh, gw), gw)

    def order(x):
        x = x.reshape(gh // merge, merge, gw // merge, merge)
        return x.transpose(0, 2, 1, 3).reshape(-1)

    return order(rows), order(cols)


def position_samples(
    grid: tuple[int, int], side: int, merge: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where a grid of patches reads the learned side x side position table, bilinearly.

    The corners of both grids coincide.

    Returns:
        index int [gh gw, 4] into the flattened table, weight float64 [gh gw, 4].
    """

    def axis(length, at):
        where = np.linspace(0.0, side - 1.0, length)[at]
        low = np.floor(where).astype(int)
        high = np.minimum(low + 1, side - 1)
        return np.stack([low, high], axis=-1), np.stack([1 - where + low, where - low], axis=-1)

    rows, cols = block_major(grid, merge)
    (row, row_weight), (col, col_weight) = axis(grid[0], rows), axis(grid[1], cols)
    index = row[:, :, None] * side + col[:, None, :]
    weight = row_weight[:, :, None] * col_weight[:, None, :]
    return index.reshape(-1, 4), weight.reshape(-1, 4)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP; the carry also holds the taps recorded so far."""

    config: VisionConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, carry, index, cos, sin, tap_layers):
        c = self.config
        x, recorded = carry

        def norm(name):
            return LayerNorm(NORM_EPS, dtype=self.dtype, name=name)(x)

        def dense(features, name):
            return Dense(features, dtype=self.dtype, name=name)

        qkv = dense(3 * c.hidden_size, "qkv")(norm("norm1"))
        qkv = qkv.reshape(*x.shape[:2], 3, c.num_heads, c.hidden_size // c.num_heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        out = attention(rotate_half(q, cos, sin), rotate_half(k, cos, sin), v)
        x = x + dense(c.hidden_size, "proj")(out.reshape(x.shape))
        h = dense(c.intermediate_size, "linear_fc1")(norm("norm2"))
        x = x + dense(c.hidden_size, "linear_fc2")(nn.gelu(h, approximate=True))
        return (x, record(recorded, tap_layers == index, x)), None


class Merger(nn.Module):
    """Joins merge^2 neighbouring patches [B, N, D] -> [B, N / merge^2, out]."""

    config: VisionConfig
    norm_after_joining: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = self.config.merged_dim
        norm = LayerNorm(NORM_EPS, dtype=self.dtype, name="norm")
        joined = (x.shape[0], -1, width)
        x = norm(x.reshape(joined)) if self.norm_after_joining else norm(x).reshape(joined)
        x = nn.gelu(Dense(width, dtype=self.dtype, name="linear_fc1")(x), approximate=False)
        return Dense(self.config.out_hidden_size, dtype=self.dtype, name="linear_fc2")(x)


class VisionTower(nn.Module):
    """Patches of one image per row -> features for the language model.

    Params: `blocks` and `deepstack_mergers` are stacked on a leading axis.
    """

    config: VisionConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, patches: jax.Array, grid: tuple[int, int]
    ) -> tuple[jax.Array, jax.Array]:
        """One pass; every row attends within its own image.

        Args:
            patches: [B, gh gw, 3 T P P] in block-major order, as data/prompts.py cuts them.
            grid: (gh, gw), static, both multiples of the merge size.

        Returns:
            merged [B, gh gw / 4, out] and deepstack [S, B, gh gw / 4, out], in `dtype`.

        Raises:
            ValueError: Shapes that do not fit.
        """
        c = self.config
        gh, gw = grid
        if gh % c.spatial_merge_size or gw % c.spatial_merge_size:
            raise ValueError(
                f"VisionTower: expected a grid in multiples of {c.spatial_merge_size}, got {grid}"
            )
        check_shapes("VisionTower", patches=(patches, f"B {gh * gw} {c.patch_dim}"))

        x = Dense(c.hidden_size, dtype=self.dtype, name="patch_embed")(patches)
        x = x + self._positions(grid).astype(self.dtype)
        rows, cols = block_major(grid, c.spatial_merge_size)
        freqs = inverse_frequencies(c.hidden_size // c.num_heads // 2, VISION_ROPE_THETA)
        angles = np.concatenate([rows[:, None] * freqs, cols[:, None] * freqs], axis=-1)
        cos, sin = (
            jnp.broadcast_to(jnp.asarray(f(angles), jnp.float32), (x.shape[0], *angles.shape))
            for f in (np.cos, np.sin)
        )
        taps = c.deepstack_visual_indexes
        scanned = nn.scan(
            VisionBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * 3),
            length=c.depth,
            check_constancy_invariants=False,  # see layers.scan_layers
        )
        (x, recorded), _ = scanned(c, self.dtype, name="blocks")(
            (x, jnp.zeros((len(taps), *x.shape), x.dtype)),
            jnp.arange(c.depth), cos, sin, jnp.asarray(taps),
        )
        stacked_merger = nn.vmap(Merger, variable_axes={"params": 0}, split_rngs={"params": True})
        deepstack = stacked_merger(c, True, self.dtype, name="deepstack_mergers")(recorded)
        return Merger(c, False, self.dtype, name="merger")(x), deepstack

    def _positions(self, grid: tuple[int, int]) -> jax.Array:
        c = self.config
        table = parameter(
            self, "pos_embed", nn.initializers.normal(0.02), c.num_position_embeddings,
            c.hidden_size,
        )
        side = round(c.num_position_embeddings**0.5)
        index, weight = position_samples(grid, side, c.spatial_merge_size)
        return jnp.einsum(
            "nsd,ns->nd", table[index].astype(jnp.float32), jnp.asarray(weight, jnp.float32)
        )


def _image_offsets(ids: jax.Array, image_token_id: int) -> tuple[jax.Array, jax.Array]:
    """Where the image of each row stands: bool [B, L], and distance from its first token."""
    is_image = ids == image_token_id
    start = jnp.argmax(is_image, axis=1)
    return is_image, jnp.arange(ids.shape[1]) - start[:, None]


def mrope_positions(
    ids: jax.Array, grid: tuple[int, int], image_token_id: int, merge_size: int = 2
) -> jax.Array:
    """Positions on the axes time, height and width; every row holds one image of this grid.

    Text counts up on all three axes. An image that starts at position s keeps time s, spreads
    its rows and columns from s, and the text after it resumes at s + max(rows, columns). Pads
    count as text.

    Args:
        ids: int32 [B, L]; each row holds gh gw / merge_size^2 image tokens side by side.
        grid: (gh, gw) of patches, before merging.
        image_token_id: Id of the image tokens.
        merge_size: Patches per token and axis.

    Returns:
        int32 [3, B, L].
    """
    check_shapes("mrope_positions", ids=(ids, "B L"))
    rows, cols = grid[0] // merge_size, grid[1] // merge_size
    index = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    is_image, offset = _image_offsets(ids, image_token_id)
    start = index - offset
    text = jnp.where(offset < 0, index, index - rows * cols + max(rows, cols))
    image = jnp.stack([start, start + offset // cols, start + offset % cols])
    return jnp.where(is_image, image, text)


def mrope_angles(
    positions: jax.Array, mrope_section: Sequence[int], head_dim: int, theta: float
) -> jax.Array:
    """Rotary angles whose frequencies take turns among time, height and width.

    Args:
        positions: int32 [3, B, L].
        mrope_section: How many frequencies each axis takes, adding up to head_dim / 2; what
            height and width leave over is time's.
        head_dim: d.
        theta: Rope base.

    Returns:
        float32 [B, L, d / 2].

    Raises:
        ValueError: Sections that do not add up.
    """
    if sum(mrope_section) != head_dim // 2:
        raise ValueError(
            f"mrope_section: expected {head_dim // 2} frequencies in all, got {mrope_section}"
        )
    axis_of = np.zeros(head_dim // 2, int)
    for axis in (1, 2):
        axis_of[axis : 3 * mrope_section[axis] : 3] = axis
    freqs = jnp.asarray(inverse_frequencies(head_dim, theta))
    return jnp.moveaxis(positions.astype(jnp.float32)[axis_of], 0, -1) * freqs


def multimodal_features(
    text_encoder: Qwen3,
    text_variables: Mapping,
    vision: VisionTower,
    vision_variables: Mapping,
    *,
    ids: jax.Array,
    mask: jax.Array,
    patches: jax.Array,
    grid: tuple[int, int],
    image_token_id: int,
    mrope_section: Sequence[int],
    rope_theta: float,
    tap: int,
) -> jax.Array:
    """Features of prompts that each hold one image.

    Args:
        text_encoder: The pipeline's own encoder; its config's rope_theta is not used here.
        text_variables: Its variables.
        vision: Qwen3-VL's vision tower.
        vision_variables: Its variables.
        ids: int32 [B, L]; every row holds gh gw / 4 image tokens, side by side, anywhere.
        mask: bool [B, L], True = real token, right padded.
        patches: [B, gh gw, 3 T P P].
        grid: (gh, gw), static.
        image_token_id: Id of the image tokens.
        mrope_section: See `mrope_angles`.
        rope_theta: Qwen3-VL's 5e6 as published, or the base the text encoder was trained with.
        tap: Depth k, 1 to text_encoder.depth.

    Returns:
        [B, L, D] in the text encoder's dtype; rows of pads are finite and mean nothing.

    Raises:
        ValueError: Shapes that do not fit.

    Source: D-OPSD, z-image-turbo_self-distill-vlm.
    """
    check_shapes(
        "multimodal_features", ids=(ids, "B L"), mask=(mask, "B L"), patches=(patches, "B n C")
    )
    merged, deepstack = vision.apply(vision_variables, patches, grid)
    is_image, offset = _image_offsets(ids, image_token_id)
    slot = jnp.clip(offset, 0, merged.shape[1] - 1)[..., None]

    def spread(features, elsewhere):  # [B, M, D] -> [B, L, D]
        features = jnp.take_along_axis(features.astype(elsewhere.dtype), slot, axis=1)
        return jnp.where(is_image[..., None], features, elsewhere)

    embeddings = text_encoder.apply(text_variables, ids, method="embed")
    nothing = jnp.zeros((), embeddings.dtype)
    deepstack = jax.vmap(functools.partial(spread, elsewhere=nothing))(deepstack)
    positions = mrope_positions(ids, grid, image_token_id, vision.config.spatial_merge_size)
    angles = mrope_angles(positions, mrope_section, text_encoder.config.head_dim, rope_theta)
    return text_encoder.apply(
        text_variables, spread(merged, embeddings), mask, angles, (tap,), deepstack, method="run"
    )
