"""One mesh with axes data, fsdp, tensor, and where arrays live on it."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dopsd_jax.core.trees import Tree

AXES = ("data", "fsdp", "tensor")
# Below this many scalars a parameter is replicated: gathering it costs more than holding it.
MIN_SHARDED_SIZE = 2**20


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what is left.

    Raises:
        ValueError: Sizes that do not multiply to the number of devices.
    """
    sizes, devices = [data, fsdp, tensor], jax.device_count()
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known > 0 and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if min(sizes) < 1 or int(np.prod(sizes)) != devices:
        raise ValueError(
            f"mesh: expected data x fsdp x tensor = {devices} devices with at most one -1, got "
            f"{data} x {fsdp} x {tensor}"
        )
    types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def shard_params(mesh: Mesh, shapes: Tree) -> Tree:
    """Large parameters are split over fsdp along their last axis that divides, never a stack's."""
    def place(x):
        parts = mesh.shape["fsdp"]
        if parts > 1 and np.prod(x.shape) >= MIN_SHARDED_SIZE:
            for axis in range(x.ndim - 1, -1, -1):
                if x.shape[axis] % parts == 0 and (axis > 0 or x.ndim == 1):
                    spec = [None] * x.ndim
                    spec[axis] = "fsdp"
                    return NamedSharding(mesh, PartitionSpec(*spec))
        return replicated(mesh)

    return jax.tree.map(place, shapes)
