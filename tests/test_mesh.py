"""A train step spread over eight CPU devices beside the same step on one."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dopsd_jax.core import sharding, trees
from dopsd_jax.method import flow, lora
from dopsd_jax.method.train_step import (
    Batch,
    Method,
    dopsd,
    init_state,
    make_optimizer,
    make_train_step,
)
from dopsd_jax.models import quantization
from dopsd_jax.models.denoiser import Context
from dopsd_jax.models.z_image import ZImageConfig, ZImageTransformer
from dopsd_jax.models.z_image_denoiser import ZImageDenoiser
from dopsd_jax.weights.shapes import transformer_shapes
from dopsd_jax.weights.z_image_names import Z_IMAGE_TARGETS
from tests.commands import ROOT, environment

ROWS = 8
CONFIG = ZImageConfig(
    in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=4, cap_feat_dim=32,
    axes_dims=(4, 6, 6), axes_lens=(256, 64, 64),
)
OPTIMIZER = make_optimizer(
    learning_rate=1e-3, warmup_steps=0, b1=0.9, b2=0.999, eps=1e-3, weight_decay=0.0,
    max_grad_norm=1.0,
)
CASES = [
    ("lora", (1, 8, 1), "matmuls"), ("lora", (1, 8, 1), "activations"), ("int8", (2, 2, 2), "full"),
    ("full", (1, 8, 1), "full"),
]


def make(sizes, what, remat):
    """The jitted step on a mesh, and what it is called with; "int8" is a LoRA on such a base."""
    trainable = "full" if what == "full" else "lora"
    count = int(np.prod(sizes))
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:count])
    denoiser = ZImageDenoiser(ZImageTransformer(CONFIG, remat=remat), mesh=mesh)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    params = trees.map_named(
        lambda n, s: 0.05 * normal(*s.shape) + n.endswith("scale"),
        transformer_shapes(denoiser.network),
    )
    base, student = None, params
    if trainable == "lora":
        if what == "int8":
            params = quantization.quantise_tree(params, what, jnp.float32)
        base = sharding.place({"params": params}, sharding.shard(mesh, {"params": params}))
        targets = Z_IMAGE_TARGETS["published"]
        student = jax.tree.map(
            lambda x: x + 0.02, lora.init(jax.random.key(0), params, targets, 4)
        )
    method = Method(trainable=trainable, ema_decay=0.9)
    state = init_state(
        jax.tree.map(jnp.asarray, student), OPTIMIZER, jax.random.key_data(jax.random.key(0))
    )
    placed = sharding.shard(mesh, state)

    def context(length):
        mask = np.arange(length) < rng.integers(3, length, (ROWS, 1))
        return Context(normal(ROWS, length, 32), mask)

    batch = Batch(normal(ROWS, 8, 8, 4), context(32), context(64), flow.sigmas_shifted(2, 3.0))
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    batch = jax.tree.map(
        lambda x: sharding.place(x, rows if x.shape[0] == ROWS else whole), batch
    )
    step = jax.jit(
        make_train_step(method, OPTIMIZER, dopsd(method, denoiser.velocity)), donate_argnums=0,
        out_shardings=(placed, whole),
    )
    return step, sharding.place(state, placed), base, batch


def two_steps(*case):
    step, state, base, batch = make(*case)
    for _ in range(2):
        state, metrics = step(state, base, batch)
    split = np.mean(["fsdp" in x.sharding.spec for x in jax.tree.leaves(state.student)])
    return sharding.fetch((state, metrics)), float(split)


def difference(a, b):
    """The largest difference of two trees, beside the largest value of each leaf."""
    return max(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-8)) for x, y in zip(
        jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def in_child():
    """What the tests look at, by case; run in a process with eight devices."""
    jax.config.update("jax_default_matmul_precision", "highest")
    sharding.MIN_SHARDED_SIZE = 1
    found, alone = {}, {}
    for what, sizes, remat in CASES:
        if what not in alone:
            alone[what], _ = two_steps((1, 1, 1), what, "full")
        (state, metrics), split = two_steps(sizes, what, remat)
        want_state, want_metrics = alone[what]
        found[f"{what} {sizes} {remat}"] = {
            "metrics": difference(metrics, want_metrics),
            "student": difference(state.student, want_state.student),
            "teacher": difference(state.teacher, want_state.teacher),
            "split": split,
        }
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, capture_output=True, text=True, timeout=1800,
        check=False, env=environment(
            JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=8"
        ),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_on_a_mesh_is_the_step_on_one_device(found, case):
    what, sizes, remat = case
    got = found[f"{what} {sizes} {remat}"]
    assert got["metrics"] < 2e-5 and got["student"] < 1e-4 and got["teacher"] < 1e-4, got
    # Of the arrays; the MLP's width, 170, does not divide by 8, nor do norms by anything.
    assert got["split"] > (0.4 if what == "full" else 0.75), got


if __name__ == "__main__":
    in_child()
