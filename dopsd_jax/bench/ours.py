"""Child process: the package's own train step on random weights made in place.

    python -m dopsd_jax.bench.ours CASE    # as JSON; prints one line of JSON
"""

from __future__ import annotations

import functools
import math
import sys
import time

import jax
import jax.numpy as jnp

from dopsd_jax.bench.case import ALPHA, DTYPES, MODELS, RANK, STEPS, WARM_UPS, Case, Measured
from dopsd_jax.core.trees import Tree, map_named
from dopsd_jax.method import flow, lora, train_step
from dopsd_jax.models.denoiser import Context
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.models.z_image_denoiser import ZImageDenoiser
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.pipeline import transformer_shapes
from dopsd_jax.weights.z_image_names import Z_IMAGE_TARGETS


def random_weights(shapes: Tree) -> Tree:
    """Weights that keep the scale of what passes through, made on the device."""
    def make(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), sum(map(ord, name)))
        scale = shape.shape[-2] ** -0.5 if name.endswith("kernel") else 0.02
        draw = scale * jax.random.normal(key, shape.shape, shape.dtype)
        return 1 + draw if "norm" in name else draw

    return jax.jit(lambda: map_named(make, shapes))()


def contexts(case: Case, dtype) -> tuple[Context, Context]:
    """The student's and the teacher's, full to their last token."""
    width = MODELS[case.model]["cap_feat_dim"]

    def draw(seed: int, length: int) -> Context:
        text = jax.random.normal(jax.random.key(seed), (case.batch, length, width), dtype)
        return Context(text, jnp.ones((case.batch, length), bool))

    return draw(1, case.student_tokens), draw(2, case.teacher_tokens)


def measure(case: Case) -> Measured:
    """Compiles and runs the step of a case."""
    dtype = jnp.dtype(DTYPES[case.model])
    config = ZImageConfig.from_json(MODELS[case.model])
    denoiser = ZImageDenoiser(ZImageTransformer(config, dtype=dtype, remat=case.remat))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), transformer_shapes(denoiser.network)
    )
    base = random_weights(shapes)
    method = train_step.Method(lora_scale=ALPHA / RANK)
    optimizer = train_step.make_optimizer(
        learning_rate=1e-4, warmup_steps=0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01,
        max_grad_norm=1.0,
    )
    targets = Z_IMAGE_TARGETS["published"]
    trained = lora.init(jax.random.key(3), shapes, targets, RANK)
    state = train_step.init_state(trained, optimizer, jax.random.key_data(jax.random.key(4)))
    step = jax.jit(
        train_step.make_train_step(method, optimizer, train_step.dopsd(method, denoiser.velocity)),
        donate_argnums=0,
    )
    student_ctx, teacher_ctx = contexts(case, dtype)
    sigmas = jnp.asarray(flow.sigmas_shifted(STEPS, 3.0))
    draw = jax.jit(functools.partial(jax.random.normal, shape=(case.batch, *case.latent_shape)))

    def update(state, number: int):
        noise = draw(jax.random.key(number))
        batch = train_step.Batch(noise, student_ctx, teacher_ctx, sigmas)
        start = time.perf_counter()
        state, metrics = step(state, base, batch)
        loss = float(metrics["loss"])  # waits for the device
        return state, loss, time.perf_counter() - start

    state, _, first = update(state, 0)
    times = []
    for number in range(1, WARM_UPS + case.updates):
        state, loss, seconds = update(state, number)
        times.append(seconds)
    if not math.isfinite(loss):
        raise ValueError(f"loss: expected a finite number, got {loss}")
    times = sorted(times[WARM_UPS - 1 :])
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    return Measured(
        first, times[len(times) // 2], times[-1], memory.get("peak_bytes_in_use", 0), loss,
        device.device_kind,
    )


if __name__ == "__main__":
    workdir_lib.enable_compilation_cache()
    print(measure(Case.from_json(sys.argv[1])).to_json())
