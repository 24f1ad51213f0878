"""Child process: the package's own train step on random weights made in place.

    python -m dopsd_jax.bench.ours CASE    # as JSON; prints one line of JSON
"""

from __future__ import annotations

import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dopsd_jax.bench.case import ALPHA, DTYPES, MODELS, RANK, STEPS, WARM_UPS, Case, Measured
from dopsd_jax.core import sharding
from dopsd_jax.core.trees import Tree, map_named
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.models import quantization
from dopsd_jax.models.denoiser import Context
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.models.z_image_denoiser import ZImageDenoiser
from dopsd_jax.run import keys
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.step import Step
from dopsd_jax.weights.z_image_names import Z_IMAGE_TARGETS

SHIFT = 3.0  # of Z-Image-Turbo's schedule
# What differs from the default recipe in every case: as the torch loop beside it has it.
CHANGES = {
    "num_steps": STEPS, "shift": SHIFT, "lora.rank": RANK, "lora.alpha": float(ALPHA),
    "weight_decay": 0.01,
}


def config_of(case: Case) -> ConfigDict:
    """A run's config of the case: the default recipe; see CHANGES for what it leaves out."""
    config = keys.base()
    config.update_from_flattened_dict(CHANGES | {
        "text_tokens": case.student_tokens, "teacher_tokens": case.teacher_tokens,
        "batch_size": case.batch, "dtype": DTYPES[case.model], "remat": case.remat,
        "base_dtype": case.base_dtype,
    })
    return config


def denoiser_of(case: Case) -> ZImageDenoiser:
    config, dtype = ZImageConfig.from_json(MODELS[case.model]), jnp.dtype(DTYPES[case.model])
    return ZImageDenoiser(ZImageTransformer(config, dtype, case.remat))


def step_of(case: Case) -> Step:
    """The run's own step, on one device."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Step(config_of(case), denoiser_of(case), Z_IMAGE_TARGETS, mesh)


def random_weights(shapes: Tree, base_dtype: str) -> Tree:
    """Weights that keep the scale of what passes through, made on the device."""
    def make(name: str, shape: jax.ShapeDtypeStruct) -> quantization.Kernel:
        key = jax.random.fold_in(jax.random.key(0), sum(map(ord, name)))
        scale = shape.shape[-2] ** -0.5 if name.endswith("kernel") else 0.02
        draw = scale * jax.random.normal(key, shape.shape, shape.dtype)
        if quantization.is_quantised(shape):
            return quantization.quantise(draw, base_dtype, shape.dtype)
        return 1 + draw if "norm" in name else draw

    where = jax.tree.map(lambda s: s.sharding, shapes)
    return jax.jit(lambda: map_named(make, shapes), out_shardings=where)()


def contexts(case: Case) -> tuple[Context, Context]:
    """The student's and the teacher's, full to their last token."""
    width = MODELS[case.model]["cap_feat_dim"]

    def draw(seed: int, length: int) -> Context:
        shape = (case.batch, length, width)
        text = jax.random.normal(jax.random.key(seed), shape, jnp.dtype(DTYPES[case.model]))
        return Context(np.asarray(text), np.ones((case.batch, length), bool))

    return draw(1, case.student_tokens), draw(2, case.teacher_tokens)


def measure(case: Case) -> Measured:
    """Compiles and runs the step of a case."""
    step, bucket = step_of(case), Bucket(case.side, case.side)
    base_shapes = step.base_shapes or {"params": step.state_shapes.student}
    base, state = step.init(random_weights(base_shapes["params"], case.base_dtype))
    features = (*contexts(case), None)

    def update(state, number: int):
        batch = step.batch(number, state.rng, bucket, SHIFT, features)
        jax.block_until_ready(batch)
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
