"""A run's directory as twenty updates leave it, written by hand, for tests of what reads one."""

import jax
import jax.numpy as jnp
import numpy as np

from dopsd_jax.core.checkpoints import Checkpoints
from dopsd_jax.core.metrics import Metrics
from dopsd_jax.method import dora, lokr
from dopsd_jax.method import lora as lora_lib
from dopsd_jax.run import previews
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.keys import base
from dopsd_jax.weights.pipeline import load_pipeline
from dopsd_jax.weights.shapes import transformer_shapes

PROMPTS = ("a cat, blueprint style", "a rocket: \"blueprint\" style")


def pictures(seed, count):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 48, 3), np.uint8)


def load_params(pipeline):
    return load_pipeline(pipeline, dtype="float32", parts=("transformer",)).params


def make_run(workdir, pipeline, kind="lora", **changes):
    """A directory as a run of 20 updates on 8 rows leaves it, of a kind of adapter."""
    pipe = load_pipeline(pipeline, parts=())
    config = base()
    config.update({"model": str(pipeline), "data": str(workdir.parent / "secret photos"),
                   "batch_size": 4, "num_train_steps": 20, "sample_prompts": PROMPTS,
                   "gauge_prompts": ("a lighthouse",), "sample_steps": 2, "learning_rate": 3e-4,
                   "anchor": 0.5, **changes})
    config.lora.rank, config.lora.alpha, config.lora.kind, config.lora.factor = 4, 8.0, kind, 4
    workdir_lib.claim(workdir, config.to_dict(), {})
    shapes = transformer_shapes(pipe.denoiser.network)
    if config.trainable == "lora":
        targets = lora_lib.match_targets(
            shapes, lora_lib.parse_targets("attention", pipe.lora.targets))
        if kind == "lokr":
            tree = lokr.init(jax.random.key(0), shapes, targets, 4, config.lora.factor)
        else:
            tree = lora_lib.init(jax.random.key(0), shapes, targets, 4)
        if kind == "dora":
            paths = [name.removesuffix("/kernel") for name in targets]
            tree = dora.begun(tree, dora.column_norms(load_params(pipeline), paths))
        tree = jax.tree.map(lambda x: x + 0.05, tree)
    else:
        params = load_params(pipeline)
        tree = jax.tree.map(lambda x: jnp.asarray(x) * 1.5, params)
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(20, {"student": tree, "teacher": tree}, {"step": 20})
    checkpoints.close()
    metrics = Metrics(workdir, 0)
    for step in (0, 20):
        if step:
            metrics.scalars(step, {"loss": 1.0, "epochs": 10.0})
        metrics.gauges(step, {"style": 30.5 - step, "drift": 0.1 * step, "sharpness_ratio": 1.0})
    metrics.close()
    two, one = pictures(0, 2), pictures(1, 1)
    for name, columns in {
        "step": [("target", two), ("base", two // 2), ("student", two // 3), ("teacher", two)],
        "prompts": [("base", two // 2), ("student", two // 3)],
        "gauge": [("base", one), ("student", one)],
    }.items():
        previews.save(workdir / "samples" / f"{name}_000020.png", previews.grid(columns))
    return workdir
