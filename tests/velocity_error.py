"""Prints how far quantised weights move a velocity: |v - v32| / |v32|, and beside bfloat16's.

    python -m tests.velocity_error --model mini         # the shipped model, minutes
    python -m tests.velocity_error --model mini --part text_encoder
    python -m tests.velocity_error [--side 16] [--text 32] [--kinds bfloat16,int8]

The last is of Z-Image at full size with random weights: the network as it is, but its layers are
drawn, quantised and evaluated one at a time, so that 24 GB hold the float32 one too.
"""

from __future__ import annotations

import functools
import time
import zlib

import jax
import jax.numpy as jnp
from absl import app, flags

from configs.mini_tasks import PROMPTS
from dopsd_jax.core import trees
from dopsd_jax.data.keeping import read_prompts
from dopsd_jax.method import sampling
from dopsd_jax.method.contexts import text_context
from dopsd_jax.models import quantization
from dopsd_jax.models.quantization import AS_DTYPE
from dopsd_jax.models.z_image import Block, ZImageConfig, ZImageTransformer
from dopsd_jax.weights.pipeline import load_pipeline
from dopsd_jax.weights.shapes import transformer_shapes

FLAGS = flags.FLAGS
PLAIN = "bfloat16"
PARTS = {"transformer": "base_dtype", "text_encoder": "encoder_dtype"}
LAYERS = ("noise_refiner", "context_refiner", "layers")


def draw(name: str, shape: tuple[int, ...], layer: int = 0) -> jax.Array:
    """Random bfloat16 weights: kernels keep variance, scales are 1, the rest is normal."""
    last = name.rpartition("/")[2]
    if last in ("scale", "bias"):
        return jnp.full(shape, float(last == "scale"), jnp.bfloat16)
    key = jax.random.fold_in(jax.random.key(zlib.crc32(name.encode())), layer)
    width = shape[-2] if last == "kernel" else 1
    return (jax.random.normal(key, shape, jnp.bfloat16) * width**-0.5).astype(jnp.bfloat16)


class LayerByLayer(ZImageTransformer):
    """The same network; the parameters of its layers are drawn when their turn comes."""

    kind: str = ""

    def _blocks(self, name, x, time, cos, sin, lengths):
        block = Block(self.config, self.dtype, modulated=name != "context_refiner", parent=None)
        run = jax.jit(lambda p, *args: block.apply({"params": p}, *args)[0])
        shapes = transformer_shapes(ZImageTransformer(self.config, parent=None))[name]
        for layer in range(jax.tree.leaves(shapes)[0].shape[0]):
            params = trees.map_named(
                lambda n, s, i=layer: draw(f"{name}/{n}", s.shape[1:], i), shapes
            )
            if self.kind:
                params = jax.tree.map(
                    lambda p: _quantise(p, self.kind) if p.ndim == 2 else p, params
                )
            x = run(params, x, time, cos, sin, lengths).block_until_ready()
        return x


@functools.partial(jax.jit, static_argnums=1)
def _quantise(kernel: jax.Array, kind: str):
    return quantization.quantise(kernel, kind)


def velocity_at_full_size(dtype, kind: str, side: int, text: int) -> jax.Array:
    """Float32 [1, side, side, 16] of one evaluation with `text` tokens of a caption."""
    network = LayerByLayer(ZImageConfig(), dtype, kind=kind)
    shapes = transformer_shapes(ZImageTransformer(network.config))
    outside = {n: s for n, s in trees.flatten(shapes).items() if n.split("/")[0] not in LAYERS}
    params = trees.unflatten({n: draw(n, s.shape) for n, s in outside.items()})
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (1, side, side, network.config.in_channels))
    features = jax.random.normal(keys[1], (1, text, network.config.cap_feat_dim))
    args = x, jnp.array([0.4]), features, jnp.ones((1, text), bool)
    return network.apply({"params": params}, *args).astype(jnp.float32)


def velocity_of_mini(dtype, kind: str, part: str = "transformer") -> jax.Array:
    """Float32 [64, ..] of the shipped model: 16 prompts at four noise levels."""
    pipe = load_pipeline("mini", dtype=jnp.dtype(dtype).name, **{PARTS[part]: kind or AS_DTYPE})
    prompts = read_prompts(PROMPTS)[:16]
    context = text_context(pipe, prompts, length=pipe.text.lengths[0])
    side = pipe.sample_size
    noise = sampling.draw_noise(range(len(prompts)), pipe.denoiser.latent_shape(side, side))
    run = jax.jit(pipe.denoiser.velocity)
    found = [
        run({"params": pipe.params}, noise, jnp.full(len(prompts), sigma), context)
        for sigma in (0.9, 0.7, 0.5, 0.2)
    ]
    return jnp.concatenate(found).astype(jnp.float32)


def main(_) -> None:
    def velocity(dtype, kind):
        if FLAGS.model == "mini":
            return velocity_of_mini(dtype, kind, FLAGS.part)
        return velocity_at_full_size(dtype, kind, FLAGS.side, FLAGS.text)

    exact = velocity(jnp.float32, "")
    errors = {}
    for kind in FLAGS.kinds:
        began = time.monotonic()
        quantised = "" if kind == PLAIN else kind
        moved = velocity(jnp.bfloat16, quantised) - exact
        errors[kind] = float(jnp.linalg.norm(moved) / jnp.linalg.norm(exact))
        beside = f"{errors[kind] / errors[PLAIN]:5.2f} times {PLAIN}'s  " if PLAIN in errors else ""
        seconds = time.monotonic() - began
        print(f"{kind:9} {errors[kind]:.4f}  {beside}({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    flags.DEFINE_enum("model", "z-image", ["z-image", "mini"], "Which network.")
    flags.DEFINE_enum("part", "transformer", list(PARTS), "Which weights of mini are quantised.")
    flags.DEFINE_integer("side", 16, "Latents across; an eighth of the pixels.")
    flags.DEFINE_integer("text", 32, "Tokens of the caption.")
    flags.DEFINE_list("kinds", [PLAIN, *quantization.KINDS], "Of errors to print.")
    app.run(main)
