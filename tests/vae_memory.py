"""What the full-size autoencoders allocate, by the compilers; run as a file it is their child."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from dopsd_jax.core import child, sharding
from dopsd_jax.core.memory import memory_of
from dopsd_jax.models import vae_strips
from dopsd_jax.models.flux2_vae import Flux2Vae, Flux2VaeConfig
from dopsd_jax.models.vae import Vae, VaeConfig
from dopsd_jax.planning import compiler
from dopsd_jax.planning.chips import GIB, chip_of
from dopsd_jax.weights.shapes import vae_shapes

FAMILIES = {
    "Z-Image": lambda dtype: Vae(VaeConfig.z_image(), dtype),
    "FLUX.2": lambda dtype: Flux2Vae(Flux2VaeConfig.klein(), dtype),
}
TPU = "v5e:1x1"
BAR = 2.0  # GiB of temporaries
CASES = [
    ("Z-Image", "decode", 1024), ("Z-Image", "decode", 2048), ("Z-Image", "encode", 1024),
    ("Z-Image", "encode", 2048), ("FLUX.2", "decode", 2048), ("FLUX.2", "encode", 2048),
]


@functools.cache
def temporaries(
    device: str, family: str, direction: str, side: int, *, strips: bool = True,
    dtype: str = "float32",
) -> float:
    """GiB that a program allocates beside its arguments and results.

    Args:
        device: TPU, or a GPU as `plan --device` names it.
        family: Of FAMILIES.
        direction: "encode" or "decode" one picture.
        side: Of the square picture, pixels.
        strips: False: as if every picture were small.
        dtype: Of weights and computing.
    """
    asked = [device, family, direction, str(side), str(int(strips)), dtype]
    command = [sys.executable, __file__, *asked]
    if chip_of(device).target:
        dump = compiler.compile_for_gpu(command)
    else:
        dump = compiler.compile_in_child(command, f"jit_{direction}")
    arguments, results = _shapes(family, direction, side, dtype)
    found = (dump.memory.total - _bytes(arguments) - _bytes(results)) / GIB
    print(f"\n| {' '.join(asked)}: GiB of temporaries | {found:.2f} | {BAR} |", flush=True)
    return found


def _program(family: str, direction: str, dtype: str):
    vae = FAMILIES[family](jnp.dtype(dtype))

    def encode(params, x):
        return vae.apply({"params": params}, x, method="encode_mode")

    def decode(params, x):
        return vae.apply({"params": params}, x, method="decode_normalised")

    return vae, {"encode": encode, "decode": decode}[direction]


def _shapes(family: str, direction: str, side: int, dtype: str):
    """(parameters, input) that the program reads, and its result."""
    vae, program = _program(family, direction, dtype)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), vae_shapes(vae)
    )
    # What the other direction reads is no argument of the compiled program.
    other = {"encode": "decoder", "decode": "encoder"}[direction]
    read = {name: tree for name, tree in params.items() if other not in name}
    picture = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    if direction == "decode":
        picture = jax.eval_shape(_program(family, "encode", dtype)[1], params, picture)
    return (read, picture), jax.eval_shape(program, params, picture)


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _mesh(device: str):
    from jax.experimental import topologies

    if target := chip_of(device).target:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=device, target_config=target, topology="1x1x1"
        )
    else:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=device, chips_per_host_bounds=(1, 1, 1)
        )
    return sharding.make_mesh(1, 1, 1, devices=found.devices)


def main() -> None:
    device, family, direction, side, strips, dtype, directory = sys.argv[1:]
    child.end_with_parent()
    if not int(strips):
        vae_strips.WHOLE = float("inf")
    mesh = _mesh(device)
    _, program = _program(family, direction, dtype)
    arguments, _ = _shapes(family, direction, int(side), dtype)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)),
        arguments,
    )
    with sharding.use_mesh(mesh):
        compiled = jax.jit(program).lower(*arguments).compile()
    (Path(directory) / compiler.FINAL).write_text(compiled.as_text())
    (Path(directory) / compiler.COUNTED).write_text(json.dumps(memory_of(compiled)))


if __name__ == "__main__":
    main()
