"""One mesh with axes data, fsdp, tensor, and where arrays live on it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dopsd_jax.core.trees import Tree

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that split a batch
# Below this many scalars a parameter (one layer of a stack) is whole everywhere: gathering it
# costs more than holding it. Of an adapter already an eighth of it is split: a scalar that trains
# is held four times, in float32, where a frozen one has 2 bytes.
MIN_SHARDED_SIZE = 2**16

# Options of the TPU compiler without which v6e and v5p gather weights while nothing else runs, and
# with which v5e does what it does anyway.
ASYNC_COLLECTIVES = (
    "xla_enable_async_all_gather",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
)
COMPILER_OPTIONS = {  # by how a chip names itself
    "TPU v5 lite": dict.fromkeys(ASYNC_COLLECTIVES, "true"),
    "TPU v5": dict.fromkeys(ASYNC_COLLECTIVES, "true"),
    "TPU v6 lite": dict.fromkeys(ASYNC_COLLECTIVES, "true"),
}
# XLA would compute x W and the LoRA's x a as one product, for which it copies W beside a, in every
# layer and pass: 87 GB read and written per update of Z-Image at 1024 x 1024.
GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}

# Of adapters, see models/adapters.py: LoRA [in, r] and [r, out], and the same of LoKr.
ADAPTERS = {
    "a": ("fsdp", None), "b": (None, "fsdp"),
    "w2_down": ("fsdp", None), "w2_up": (None, "fsdp"), "w2": ("fsdp", None),
}
# Name -> how the last axes of an array lie on the mesh; axes before them, such as a stack's, stay
# whole. The last part of a name counts: names of trained trees, moments and averages end as their
# parameters do. What a network adds with `add_names` comes before these.
RULES: dict[str, tuple[str | None, ...]] = {
    "kernel": ("fsdp", None),  # of a linear layer, [in, out]
    "embed_tokens": ("fsdp", None),
    **ADAPTERS,
    **dict.fromkeys(("w1", "m", "g", "norm"), ()),  # the rest of adapters
    **dict.fromkeys(("scale", "bias"), ()),
    **dict.fromkeys(("step", "rng", "count"), ()),  # of a train state
}
QUANTISED = ("qvalue", "scale", "zero_point")  # what a qwix.QArray is made of
_ADDED: dict[str, tuple[str | None, ...]] = {}  # like RULES, by one or two parts of a name


def add_names(
    columns: Sequence[str] = (), rows: Sequence[str] = (), whole: Sequence[str] = ()
) -> None:
    """Says where parameters of a network lie that RULES do not know or would place otherwise.

    Networks share one table, so the order in which they are added does not matter: a name has one
    place, whoever asks.

    Args:
        columns: Linears whose outputs are heads or MLP columns; the axis "tensor" splits these.
        rows: Linears that take such outputs; "tensor" splits their inputs.
        whole: Other parameters, which every device holds whole.

    Raises:
        ValueError: A name that has another place already.
    """
    wanted = {
        **{f"{name}/kernel": ("fsdp", "tensor") for name in columns},
        **{f"{name}/kernel": ("tensor", "fsdp") for name in rows},
        **dict.fromkeys(whole, ()),
    }
    known = RULES | _ADDED
    wrong = [
        f"{name}: expected its place {known[name]}, which RULES or another network gave it, got "
        f"{axes}" for name, axes in wanted.items() if known.get(name, axes) != axes
    ]
    if both := set(columns) & set(rows):
        wrong.append(f"{', '.join(sorted(both))}: expected among columns or among rows, got both")
    if wrong:
        raise ValueError("sharding: " + "; ".join(wrong) + "; call the parameter something else")
    _ADDED.update(wanted)


def _axes_of(name: str) -> tuple[str | None, ...]:
    """The place of a parameter by the last two parts of its name, or by the last.

    Parts of a quantised array lie as the array would.

    Raises:
        KeyError: Nobody has said where it lies.
    """
    *parents, last = name.split("/")
    if last in QUANTISED:  # a norm has a scale, too
        with contextlib.suppress(KeyError):
            return _axes_of("/".join(parents))
    for part in ("/".join([*parents[-1:], last]), last):
        for table in (_ADDED, RULES):
            if part in table:
                return table[part]
    raise KeyError(name)


def _of_adapter(name: str) -> bool:
    """Whether an array is one of ADAPTERS, or a part of one that is quantised."""
    *parents, last = name.split("/")
    return (parents[-1] if parents and last in QUANTISED else last) in ADAPTERS


def fsdp_axis(name: str, ndim: int) -> int | None:
    """The axis along which fsdp splits an array of so many axes, by its name; None for none."""
    try:
        axes = _axes_of(name)
    except KeyError:
        return None
    return ndim - len(axes) + axes.index("fsdp") if "fsdp" in axes else None


def mesh_sizes(count: int, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """Sizes of the axes over `count` devices; one may be -1 and takes what is left.

    Raises:
        ValueError: Sizes that do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or int(np.prod(sizes)) != count:
        raise ValueError(
            f"mesh: expected data x fsdp x tensor = {count} devices with at most one -1, got "
            f"{data} x {fsdp} x {tensor}"
        )
    return tuple(sizes)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what is left.

    Neighbours on the mesh are neighbours on a TPU's links as far as may be. Of several slices,
    which only a slower network connects, each has its own part of the axis data.

    Args:
        data, fsdp, tensor: Sizes of the axes.
        devices: Others than this machine's, such as those of a topology that is only planned for.

    Raises:
        ValueError: Sizes that do not multiply to the number of devices, or slices that do not
            divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(len(devices), data, fsdp, tensor)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data: expected a multiple of {slices}, the number of slices, got {sizes[0]}"
        )
    # An axis may take a part of a physical one: 4 x 16 on links of 8 x 8.
    if slices > 1:
        within = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def own_mesh() -> Mesh | None:
    """This process's devices in one line, weights split over them; None if it is only one."""
    own = jax.local_devices()
    return make_mesh(1, -1, 1, devices=own) if len(own) > 1 else None


def compiler_options(mesh: Mesh) -> dict[str, str | int] | None:
    """What to tell the compiler about a step on this mesh; for jax.jit."""
    device = mesh.devices.flat[0]
    return GPU_OPTIONS if device.platform == "gpu" else COMPILER_OPTIONS.get(device.device_kind)


def use_mesh(mesh: Mesh | None):
    """A context for tracing: what is traced in it may say where its arrays lie on `mesh`.

    A mesh of one device says nothing but what is traced for, see `platform`.
    """
    if mesh is None:
        return contextlib.nullcontext()
    if mesh.size == 1:
        return _use_platform(mesh)
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def _use_platform(mesh: Mesh | AbstractMesh):
    device = mesh.abstract_device if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]
    token = _PLATFORM.set(None if device is None else device.platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def platform() -> str:
    """What is traced for: the platform of the mesh of `use_mesh`, else JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device.platform
    return _PLATFORM.get() or jax.default_backend()


def rows_axes(size: int) -> tuple[str, ...] | None:
    """The mesh axes that split `size` rows; None without a mesh or if they do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or size % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return None
    return ROWS


def split_rows(tree: Tree) -> Tree:
    """Says that the rows of arrays [B, ..] are split over the mesh of `use_mesh`."""
    def split(x):
        axes = rows_axes(x.shape[0]) if x.ndim else None
        spec = PartitionSpec(axes)
        return x if axes is None else jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(split, tree)


def all_gather_param(name: str, w: jax.Array) -> jax.Array:
    """Gathers a parameter that is split over fsdp, for the layer that is about to use it.

    Its gradient goes straight back to the parts. The transpose of a plain sharding constraint
    would instead ask for the whole gradient on every device, and add it up there. Cast before:
    what is moved should be small.

    Args:
        name: Of the parameter, by which it is placed.
        w: [in, out], one layer of a stack.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return w
    part = spec_of(name, w.shape, mesh)
    if "fsdp" not in part:
        return w
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in part))

    @jax.custom_vjp
    def gather(w):
        return jax.lax.with_sharding_constraint(w, whole)

    gather.defvjp(
        lambda w: (gather(w), None),
        lambda _, g: (jax.lax.with_sharding_constraint(g, part),),
    )
    return gather(w)


def barrier(inputs: Tree, variables: Tree) -> tuple[Tree, Tree]:
    """Returns both unchanged, but the compiler may not use the variables before the inputs exist.

    Without this, weights that are gathered in a loop whose turns all need the same ones are
    gathered for all layers before the loop, and then lie whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return inputs, variables
    return jax.lax.optimization_barrier((inputs, variables))


def spec_of(name: str, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Where a parameter lies on a mesh, by RULES and what `add_names` added to them.

    An axis that does not divide stays whole; fsdp then takes the other of the last two, if it can.

    Raises:
        KeyError: No rule matches the name.
    """
    axes = _axes_of(name)
    size = int(np.prod(shape[len(shape) - len(axes):])) if axes else 0
    least = MIN_SHARDED_SIZE // 8 if _of_adapter(name) else MIN_SHARDED_SIZE
    if size < least or len(shape) < len(axes):
        return PartitionSpec()
    start = len(shape) - len(axes)

    def fits(axis, i):
        return axis is None or shape[start + i] % mesh.shape[axis] == 0

    found = [a if a and mesh.shape[a] > 1 and fits(a, i) else None for i, a in enumerate(axes)]
    if "fsdp" in axes and "fsdp" not in found and mesh.shape["fsdp"] > 1:
        free = [i for i, a in enumerate(found) if a is None and fits("fsdp", i)]
        if free:
            found[free[-1]] = "fsdp"
    return PartitionSpec(*[None] * start, *found) if any(found) else PartitionSpec()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def shard(mesh: Mesh, shapes: Tree) -> Tree:
    """Where every array of a tree lies: parameters, LoRA, moments and averages alike.

    Raises:
        ValueError: Every array that no rule accounts for, together.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    placed, unknown = [], []
    for name, (_, x) in zip(names, leaves, strict=True):
        try:
            placed.append(NamedSharding(mesh, spec_of(name, x.shape, mesh)))
        except KeyError:
            unknown.append(f"{name} {tuple(x.shape)}")
    if unknown:
        raise ValueError(
            "no sharding rule accounts for: " + ", ".join(unknown)
            + "; add one to RULES of dopsd_jax/core/sharding.py or to the network's ParamNames"
        )
    return jax.tree_util.tree_unflatten(structure, placed)


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
