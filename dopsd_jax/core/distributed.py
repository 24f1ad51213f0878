"""Several processes that train together, and what they must agree on.

With one process nothing here waits, talks or changes anything.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dopsd_jax.core.log import log

NAMES = ("coordinator", "num_processes", "process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
MESSAGE_BYTES = 4096
# How long a process waits for another. One may compile, read weights or encode for long while the
# others are done already. A process that died is noticed by its missing heartbeats, which threads
# of their own send, so that this long wait does not hide it.
WAIT_S = 3600

GOOGLE = "0x1ae0"  # PCI vendor of every TPU


def skip_missing_tpu(devices: Path = Path("/sys/bus/pci/devices")) -> None:
    """Keeps JAX from looking for a TPU that is not there.

    Plans need the package libtpu on machines without one, and wherever it is installed it looks for
    chips first and prints errors at length. Where JAX_PLATFORMS is set, or JAX can use NVIDIA GPUs,
    nothing is changed.
    """
    def installed(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    cuda = installed("jax_cuda12_plugin") or installed("jax_cuda13_plugin")
    if jax.config.jax_platforms or cuda or not installed("libtpu"):
        return
    if GOOGLE not in [f.read_text().strip() for f in devices.glob("*/vendor")]:
        jax.config.update("jax_platforms", "cpu")


def define_flags() -> None:
    """--coordinator, --num_processes and --process_id; none is needed on TPU."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if there are several; or "
                        f"{VARIABLES[0]}. Not needed on TPU.")
    flags.DEFINE_integer("num_processes", None, f"How many processes; or {VARIABLES[1]}.")
    flags.DEFINE_integer("process_id", None, f"Which one this is, from 0; or {VARIABLES[2]}.")


def initialize() -> None:
    """Joins the other processes of this run; to be called before JAX is used.

    On TPU they find each other. Elsewhere flags or the environment (VARIABLES) name them; without
    either there is one process. Processes but the first then log warnings alone.

    Raises:
        ValueError: Some of the three values are missing or impossible, or the processes do not
            find each other.
    """
    values = flags.FLAGS.flag_values_dict()
    given = _read([values.get(n) for n in NAMES], os.environ)
    if given is None and not _on_tpu():
        return
    try:
        if given is None:
            jax.distributed.initialize(initialization_timeout=WAIT_S)
        else:
            address, count, index = given
            # Without "deactivate", Slurm's variables would hide all GPUs but one per process.
            jax.distributed.initialize(
                address, count, index, cluster_detection_method="deactivate",
                initialization_timeout=WAIT_S,
            )
    except RuntimeError as e:
        raise ValueError(f"the processes of this run did not find each other: {e}") from e
    if jax.process_count() > 1:
        any_process(False)  # connects one device of every process
        connect(_every_device().mesh)
        log.info("process %d of %d, %d of %d devices", jax.process_index(), jax.process_count(),
                 jax.local_device_count(), jax.device_count())
    if not is_main():
        log.setLevel(logging.WARNING)


def _read(given: list, environment) -> tuple[str, int, int] | None:
    """(address, processes, index) from flags, else from the environment; None: neither."""
    values = [
        value if value is not None else environment.get(variable) or None
        for value, variable in zip(given, VARIABLES, strict=True)
    ]
    if values == [None] * 3:
        return None
    how = " and ".join(f"--{n} ({v})" for n, v in zip(NAMES, VARIABLES, strict=True))
    if None in values:
        raise ValueError(f"several processes need all of {how}, got {values}")
    address, *numbers = values
    try:
        count, index = (int(n) for n in numbers)
    except ValueError as e:
        raise ValueError(f"{how}: expected whole numbers for the last two, got {numbers}") from e
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 <= index < count:
        raise ValueError(
            f"{how}: expected HOST:PORT, a number, and one from 0 below it, got {values}"
        )
    return address, count, index


def _on_tpu() -> bool:
    """Whether JAX will use this machine's TPU chips."""
    platforms = os.environ.get("JAX_PLATFORMS", "") or jax.config.jax_platforms or ""
    if (platforms and "tpu" not in platforms) or importlib.util.find_spec("libtpu") is None:
        return False
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips)


def is_main() -> bool:
    """Whether this is the process that writes logs, numbers and pictures."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Waits until every process is here, for WAIT_S at most.

    To be called before a program that exchanges data between processes runs for the first time:
    on CPU the processes connect to each other then, and Gloo gives up after 30 seconds, a time
    that cannot be set. This wait is the coordination service's own and needs no connection.

    Args:
        name: What is waited for, the same in every process; it stands in the error.
    """
    client = global_state.client
    if client is None or jax.process_count() == 1:
        return
    # A barrier's name is good for one use; every process comes to its barriers in the same order.
    client.wait_at_barrier(f"dopsd_jax:{next(_meetings)}:{name}", WAIT_S * 1000)


_meetings = itertools.count()


def connect(mesh: Mesh) -> None:
    """Connects the processes in every group of devices that a program on `mesh` may sum over.

    Each group of devices connects on its own, when a program first exchanges data in it. All is
    done here, where the processes are together, so that programs may later be compiled, and
    called, at very different times.
    """
    if jax.process_count() == 1:
        return
    axes = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ones = jax.make_array_from_callback(
        (mesh.size,), spread, lambda _: np.ones(1, np.int32)
    )
    for count in range(1, len(axes) + 1):
        for names in itertools.combinations(axes, count):
            total = jax.jit(jax.shard_map(
                functools.partial(jax.lax.psum, axis_name=names), mesh=mesh, in_specs=spread.spec,
                out_specs=PartitionSpec(tuple(n for n in mesh.axis_names if n not in names)),
            )).lower(ones).compile()
            meet("connect " + " ".join(names))
            total(ones).block_until_ready()


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        meet(name)
        multihost_utils.sync_global_devices(name)


def on_main(action: Callable[[], None]) -> None:
    """Runs `action` on process 0 while the others wait; its ValueError is raised in all."""
    problem = ""
    if is_main():
        try:
            action()
        except ValueError as e:
            if jax.process_count() == 1:
                raise
            problem = str(e)
    if problem := _broadcast_text(problem):
        raise ValueError(problem)


def check_same(what: str, text: str) -> None:
    """Raises ValueError in every process unless `text` is the same in all."""
    other = text != _broadcast_text(text)
    if any_process(other):
        raise ValueError(
            f"{what}: process 0 and another see different contents; every machine must see the "
            "same files" + (f" (process {jax.process_index()} differs)" if other else "")
        )


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; waits for all of them."""
    if jax.process_count() == 1:
        return flag
    meet("any_process")
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def _broadcast_text(text: str) -> str:
    """Process 0's text, cut to MESSAGE_BYTES."""
    if jax.process_count() == 1:
        return text
    buffer = np.zeros(MESSAGE_BYTES, np.uint8)
    raw = np.frombuffer(text.encode()[:MESSAGE_BYTES], np.uint8)
    buffer[: len(raw)] = raw
    meet("broadcast")
    raw = multihost_utils.broadcast_one_to_all(buffer).astype(np.uint8)
    return raw.tobytes().rstrip(b"\0").decode(errors="ignore")


class Vote:
    """Whether any process wants to stop: known to all at the same step, one step late.

    Asking hands the device a sum of one number per process, and looks at the sum of the step
    before, so that nobody waits for a step that is still running.
    """

    def __init__(self):
        self._before: jax.Array | None = None

    def __call__(self, wish: bool) -> bool:
        """To be called once per step by every process; with one process, `wish` itself."""
        if jax.process_count() == 1:
            return wish
        before, self._before = self._before, _sum_of_all(wish)
        return before is not None and int(before.addressable_data(0)) > 0


def _sum_of_all(wish: bool) -> jax.Array:
    sharding = _every_device()
    local = np.full(1, wish, np.int32)
    votes = jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: local)
    return _sum(votes)


@functools.cache
def _every_device() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), ("device",)), PartitionSpec("device"))


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x)
