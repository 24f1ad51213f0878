"""Which policy of rematerialisation a run takes, where its config leaves that open.

The less a layer computes again, the more it keeps. So policies are compiled one after the other,
from the one that computes least again, until a program fits the memory that is free. The program
is kept for the run, the name of its policy in the run's directory: another policy would round
gradients otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dopsd_jax.core import distributed, memory, trees
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import log
from dopsd_jax.core.trees import Tree
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.run.keys import AUTO
from dopsd_jax.run.step import Step
from dopsd_jax.run.workdir import read_json

FILE = "remat.json"
# From the least computed again to the least kept. "none" is not among them: it unrolls the layers.
ORDER = ("activations", "dots", "linears", "matmuls", "attention", "full")
SHARE = 0.92  # of the free memory that a program may need: the rest is lost between arrays
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Choice:
    """A policy that was found, and where it holds.

    Attributes:
        policy: A key of layers.REMAT_POLICIES.
        device: Kind of the devices.
        devices: How many there are.
    """

    policy: str
    device: str
    devices: int


def as_begun(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config, with the policy that a run in `workdir` was begun with where it says AUTO now.

    Runs of earlier versions have a policy of their own in their config.json.
    """
    file = workdir / "config.json"
    if config.remat != AUTO or not file.is_file():
        return config
    config = config.copy_and_resolve_references()
    config.remat = read_json(file).get("remat", AUTO)
    return config


def fitted(step: Step, bucket: Bucket, workdir: Path, params: Tree) -> Step:
    """The step with the policy of the run, or, in a new run, with the first that fits.

    Args:
        step: With any policy; not yet called.
        bucket: Whose batches need most.
        workdir: Where the choice is kept.
        params: The network's parameters, which are on the devices already.

    Raises:
        ValueError: A damaged FILE.
    """
    here = jax.devices()
    kept = _read(workdir / FILE)
    if kept is not None:
        if (kept.device, kept.devices) == (here[0].device_kind, len(here)):
            log.info("remat: %s, as this run began", kept.policy)
            return step.with_remat(kept.policy)
        log.info("remat: this run began with %s on %d x %s", kept.policy, kept.devices, kept.device)
    free = free_memory(params)
    tried = dict[str, Step]()

    def needs(policy: str) -> float:
        tried[policy] = step.with_remat(policy)
        return needed(tried[policy], bucket)

    policy = choose(needs, free)
    choice = Choice(policy, here[0].device_kind, len(here))
    distributed.on_main(
        lambda: write_atomic(workdir / FILE, json.dumps(dataclasses.asdict(choice), indent=2))
    )
    return tried[policy]


def choose(needs: Callable[[str], float], free: float) -> str:
    """The first policy of ORDER that fits, the same in every process; the last if none does.

    Args:
        needs: Policy -> bytes that its program needs on one device.
        free: Bytes that it may need.
    """
    for policy in ORDER:
        bytes_needed = needs(policy)
        fits = not distributed.any_process(bytes_needed > free)
        log.info("remat: %s needs %s per device, %s", policy, _gib(bytes_needed),
                 "taken" if fits else f"{_gib(free)} are free")
        if fits:
            return policy
    log.warning("remat: nothing fits by XLA's count; going on with %s, which needs least", policy)
    return policy


def needed(step: Step, bucket: Bucket) -> float:
    """Bytes of one device that the program of a bucket needs; infinite if XLA refuses it."""
    try:
        compiled = step.compile(bucket)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return math.inf
    if compiled.memory_analysis() is None:  # of a backend that does not count, but would refuse
        return 0.0
    return float(sum(memory.memory_of(compiled).values()))


def free_memory(params: Tree) -> float:
    """Bytes of one device that a train step may need, its arguments included.

    That is SHARE of what is left beside everything else that is on the device now. Where devices
    have no memory of their own, they share this machine's.

    Args:
        params: What is on the devices and will be among the step's arguments.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return SHARE * memory.available() / jax.local_device_count()
    own = sum(
        trees.num_bytes(shard.data) for x in jax.tree.leaves(params) if isinstance(x, jax.Array)
        for shard in x.addressable_shards if shard.device == device
    )
    return SHARE * (stats["bytes_limit"] - max(stats["bytes_in_use"] - own, 0))


def _read(file: Path) -> Choice | None:
    if not file.is_file():
        return None
    values: dict[str, Any] = read_json(file)
    if values.get("policy") not in ORDER or values.keys() != Choice.__annotations__.keys():
        raise ValueError(
            f"{file}: expected the policy, device and devices of a run, got {values!r:.80}; "
            "restore it, or choose another --workdir"
        )
    return Choice(**values)


def _gib(size: float) -> str:
    return "more than there is" if math.isinf(size) else f"{size / GIB:.2f} GiB"
