"""A config's train step for any mesh, from shapes alone: no weights, no data, no accelerator."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from dopsd_jax.core import sharding, trees
from dopsd_jax.core.trees import Tree
from dopsd_jax.data.buckets import Bucket, make_buckets, parse_buckets
from dopsd_jax.models.denoiser import Denoiser
from dopsd_jax.planning.chips import chip_of, count_chips
from dopsd_jax.run import loras
from dopsd_jax.run.model import load_model
from dopsd_jax.run.step import Shapes, Step
from dopsd_jax.weights.families import find, published_denoiser


def buckets_of(config: ConfigDict) -> tuple[Bucket, ...]:
    return parse_buckets(config.buckets) if config.buckets else make_buckets(config.resolution)


def planned_bucket(config: ConfigDict) -> Bucket:
    """The bucket that is planned for: the square one, else the largest.

    How many references its rows have is known from the data alone, so one is planned for; a recipe
    that shows none does not count it.
    """
    buckets = buckets_of(config)
    square = [b for b in buckets if b.width == b.height]
    largest = max(square or buckets, key=lambda b: b.width * b.height)
    return dataclasses.replace(largest, references=1)


def denoiser_of(config: ConfigDict) -> Denoiser:
    """The network of config.model by its files; without a model the one of config.published."""
    if config.model:
        return load_model(config, dtype=config.dtype, remat=config.remat, parts=()).denoiser
    return published_denoiser(config.published, jnp.dtype(config.dtype), config.remat)


def step_of(config: ConfigDict, mesh: Mesh | AbstractMesh) -> Step:
    """The run's own step; config.batch_size rows in all."""
    denoiser = denoiser_of(config)
    before: tuple[Tree | None, Tree | None] = None, None
    if config.base_lora or config.init_lora or config.init_full:
        before = loras.stands_on(config, load_model(config, parts=()))
    return Step(config, denoiser, find(denoiser.network.config).targets, mesh, *before)


def bytes_per_device(tree: Tree) -> int:
    """What the parts of placed shapes on one device come to."""
    return sum(
        trees.num_bytes(jax.ShapeDtypeStruct(s.sharding.shard_shape(s.shape), s.dtype))
        for s in jax.tree.leaves(tree)
    )


def preview_bytes(config: ConfigDict, shapes: Shapes) -> int:
    """What the weights of config.preview_model take per device: as much as those of the model."""
    if not (config.preview_model and config.sample_every and shapes.base):
        return 0
    return bytes_per_device(shapes.base["params"])


def lower(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Lowered, Shapes]:
    """The step of a config, lowered for a mesh, and the shapes of its arguments."""
    step, bucket = step_of(config, mesh), planned_bucket(config)
    return step.lower(bucket), step.shapes(bucket)


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """A mesh of devices that are known by their number alone."""
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def topology_mesh(config: ConfigDict, topology: str) -> Mesh:
    """The config's mesh over the chips of a topology that need not be there."""
    from jax.experimental import topologies

    if target := chip_of(topology).target:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=topology, target_config=target, topology="1x1x1"
        )
    else:
        # A host has four chips or more unless it is said that there is but one.
        alone = {"chips_per_host_bounds": [1, 1, 1]} if count_chips(topology) == 1 else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone)
    return sharding.make_mesh(**config.mesh.to_dict(), devices=found.devices)
