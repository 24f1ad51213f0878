"""One mesh with axes data, fsdp, tensor, and where arrays live on it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
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


def place(tree: Tree, shardings: Tree) -> Tree:
    """Puts a tree on devices that may belong to several processes.

    Args:
        tree: Arrays, the same in every process, or arrays that are spread already.
        shardings: One sharding, None for the default device, or a tree of them.
    """
    def put(x, sharding):
        spread = isinstance(x, jax.Array) and not x.is_fully_addressable
        if sharding is None or sharding.is_fully_addressable or spread:
            return jax.device_put(x, sharding)
        # device_put would first compare the whole array between the processes.
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: put(x, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def fetch(tree: Tree) -> Tree:
    """The arrays as NumPy, in every process, wherever they lie."""
    def get(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(get, tree)


def local_rows(sharding: NamedSharding, size: int) -> list[int]:
    """Which of a batch's `size` rows this process's devices hold, ascending."""
    indices = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({row for (rows,) in indices for row in range(*rows.indices(size))})


def place_rows(
    sharding: NamedSharding, size: int, rows: Sequence[int], local: Tree
) -> Tree:
    """A batch of which each process has the rows of its own devices.

    Args:
        sharding: Splits the leading axis alone, see `batch_sharding`.
        size: Rows of the whole batch.
        rows: From `local_rows`.
        local: Arrays [len(rows), ..].

    Returns:
        Arrays [size, ..] on the devices.
    """
    where = {row: i for i, row in enumerate(rows)}

    def spread(x):
        def part(index):
            wanted = [where[row] for row in range(*index[0].indices(size))]
            first = wanted[0]
            if wanted == list(range(first, first + len(wanted))):  # a view, no copy
                return x[first : first + len(wanted)]
            return x[wanted]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

    return jax.tree.map(spread, local)
