"""A config's train step for any mesh, from shapes alone: no weights, no data, no accelerator.

Run as a module it is the child that plan.py starts; see `main`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dopsd_jax.core import sharding, trees
from dopsd_jax.core.trees import Tree
from dopsd_jax.data.buckets import Bucket, make_buckets, parse_buckets
from dopsd_jax.method import contexts, flow, lora
from dopsd_jax.method.train_step import (
    Batch,
    Method,
    dopsd,
    init_state,
    make_train_step,
    optimizer_of,
    sft,
)
from dopsd_jax.models.denoiser import Context, Denoiser
from dopsd_jax.planning import compiler
from dopsd_jax.weights.families import family_of_tree, published_denoiser
from dopsd_jax.weights.pipeline import load_pipeline, transformer_shapes


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a step is called with, as trees of ShapeDtypeStruct that know their shardings."""

    state: Tree
    base: Tree | None
    batch: Batch


def buckets_of(config: ConfigDict) -> tuple[Bucket, ...]:
    return parse_buckets(config.buckets) if config.buckets else make_buckets(config.resolution)


def planned_bucket(config: ConfigDict) -> Bucket:
    """The bucket that is planned for: the square one, else the largest."""
    buckets = buckets_of(config)
    square = [b for b in buckets if b.width == b.height]
    return max(square or buckets, key=lambda b: b.width * b.height)


def denoiser_of(config: ConfigDict, mesh: Mesh | None = None) -> Denoiser:
    """The network of config.model by its files; without a model the one of config.published."""
    if config.model:
        return load_pipeline(
            config.model, dtype=config.dtype, remat=config.remat, parts=(), mesh=mesh
        ).denoiser
    denoiser = published_denoiser(config.published, jnp.dtype(config.dtype), config.remat)
    return dataclasses.replace(denoiser, mesh=mesh)


def references_of(config: ConfigDict, denoiser: Denoiser, role: str) -> int:
    """Tokens of the references a role sees, rows having one reference each where the recipe takes
    the row's; each of the size of the target."""
    bucket = planned_bucket(config)
    h, w, _ = denoiser.latent_shape(bucket.height, bucket.width)
    return len(contexts.RECIPES[config.recipe].shown(role, 1)) * h * w


def trained_shapes(config: ConfigDict, params: Tree) -> Tree:
    """What trains, float32."""
    if config.trainable == "full":
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), params)
    targets = lora.parse_targets(config.lora.targets, family_of_tree(params).targets)
    return jax.eval_shape(
        lambda: lora.init(jax.random.key(0), params, targets, config.lora.rank)
    )


def method_of(config: ConfigDict) -> Method:
    return Method(
        trainable=config.trainable, lora_scale=config.lora.alpha / config.lora.rank,
        teacher=config.teacher, ema_decay=config.ema_decay, loss=config.loss,
        states=config.states, accumulation=config.accumulation,
    )


def step_shapes(config: ConfigDict, mesh: Mesh, denoiser: Denoiser) -> Shapes:
    """Arguments of the step of a config; config.batch_size rows in all."""
    params = transformer_shapes(denoiser.network)
    optimizer = optimizer_of(config)

    def make_state(trained):
        rng = jax.random.key_data(jax.random.key(0))
        return init_state(trained, optimizer, rng, jnp.dtype(config.ema_dtype))

    state = jax.eval_shape(make_state, trained_shapes(config, params))
    base = None
    if config.trainable == "lora":
        dtype = jnp.dtype(config.dtype)
        base = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), params)
    bucket, rows = planned_bucket(config), sharding.batch_sharding(mesh)
    latent = (config.batch_size, *denoiser.latent_shape(bucket.height, bucket.width))

    def array(*shape, dtype=jnp.float32, where=rows):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def context(role, length):
        B, D, M = config.batch_size, denoiser.text_width, references_of(config, denoiser, role)
        return Context(
            array(B, length, D, dtype=jnp.dtype(config.dtype)), array(B, length, dtype=bool),
            array(B, M, latent[-1]) if M else None,
            array(B, M, 4, dtype=jnp.int32) if M else None,
        )

    plain = config.objective == "sft"
    targets = plain or config.states == "noised"
    batch = Batch(
        array(*latent), context(contexts.STUDENT, config.text_tokens),
        None if plain else context(contexts.TEACHER, config.teacher_tokens),
        array(config.num_steps + 1, where=sharding.replicated(mesh)),
        array(*latent) if targets else None, array(config.batch_size) if plain else None,
    )
    return Shapes(_placed(mesh, state), base and _placed(mesh, base), batch)


def _placed(mesh: Mesh, tree: Tree) -> Tree:
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        tree, sharding.shard(mesh, tree),
    )


def bytes_per_device(tree: Tree) -> int:
    """What the parts of placed shapes on one device come to."""
    return sum(
        trees.num_bytes(jax.ShapeDtypeStruct(s.sharding.shard_shape(s.shape), s.dtype))
        for s in jax.tree.leaves(tree)
    )


def lower(config: ConfigDict, mesh: Mesh):
    """The step of a config, lowered for a mesh, and the shapes of its arguments."""
    denoiser = denoiser_of(config, mesh)
    method, shapes = method_of(config), step_shapes(config, mesh, denoiser)
    objective = {"dopsd": dopsd, "sft": sft}[config.objective](method, denoiser.velocity)
    flow.make_sigmas(config.schedule, config.num_steps, config.shift or 1.0)  # it exists
    step = jax.jit(
        make_train_step(method, optimizer_of(config), objective), donate_argnums=0,
        out_shardings=(jax.tree.map(lambda s: s.sharding, shapes.state),
                       sharding.replicated(mesh)),
        compiler_options=sharding.compiler_options(mesh),
    )
    return step.lower(shapes.state, shapes.base, shapes.batch), shapes


def topology_mesh(config: ConfigDict, topology: str) -> Mesh:
    """The config's mesh over the chips of a TPU topology that need not be there."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return sharding.make_mesh(**config.mesh.to_dict(), devices=found.devices)


def main() -> None:
    """JSON file of {config, topology, full}, directory -> compiles, so that XLA writes its dump."""
    compiler.end_with_parent()
    asked, directory = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    config = ConfigDict(asked["config"])
    lowered, _ = lower(config, topology_mesh(config, asked["topology"]))
    compiled = lowered.compile()
    if asked["full"]:
        (directory / compiler.FINAL).write_text(compiled.as_text())


if __name__ == "__main__":
    main()
