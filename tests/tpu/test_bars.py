"""What the TPU compiler says of the real train step, against the bars it must stay below.

Each case is compiled once, from shapes, as far as memory and schedule: 20 to 40 s of CPU. The one
without a mark belongs to the normal run; all of them, with the table of docs/planning.md as output:

    bash launch/test.sh -n 0 -s -m "tpu or not slow" tests/tpu

The numbers belong to jax 0.10.2 with libtpu 0.0.42.1.
"""

import functools
import subprocess
import sys
import textwrap

import pytest

from configs import z_image_turbo_full, z_image_turbo_lora
from dopsd_jax import plan
from dopsd_jax.core import trees
from dopsd_jax.planning import compiler, hlo, lowering
from dopsd_jax.planning.chips import GIB
from dopsd_jax.weights.shapes import transformer_shapes
from tests import vae_memory

pytestmark = pytest.mark.skipif(
    not compiler.has_tpu_compiler(), reason="libtpu is not installed: pip install -e '.[test]'"
)
WIDTHS = {3840, 10240, 15360}  # what a whole weight of one layer measures


@functools.cache
def planned(kind, topology, batch=1, **changes):
    config = {"lora": z_image_turbo_lora, "full": z_image_turbo_full}[kind].get_config()
    config.update({"remat": "full"} | changes)
    return plan.plan(config, topology, batch=batch)


def name(kind, topology, batch=1, **changes):
    return " ".join([kind, topology, f"batch {batch}", *(f"{k}={v}" for k, v in changes.items())])


def show(what, found, bar, unit=""):
    print(f"\n| {what} | {found:.4g}{unit} | {bar}{unit} |", flush=True)


def assert_within(bar, *case, **changes):
    p = planned(*case, **changes)
    show(f"{name(*case, **changes)}: GiB per chip", p.total / GIB, bar)
    assert p.fits and p.total / GIB <= bar
    assert_no_whole_stack_and_no_matrix_of_tokens(p)


def assert_no_whole_stack_and_no_matrix_of_tokens(p):
    tokens = {4096, 4608, 5120}
    for kind, dims in hlo.array_shapes(p.text):
        whole = len(dims) == 3 and dims[0] in (2, 30) and set(dims[1:]) <= WIDTHS
        assert not whole, f"{kind}{list(dims)} holds the weights of all layers"
        matrix = len(dims) > 1 and dims[-1] == dims[-2] and dims[-1] in tokens
        assert not matrix, f"{kind}{list(dims)} is a matrix of tokens"


def parameter_bytes():
    config = plan.with_remat(z_image_turbo_lora.get_config(), "full")
    denoiser = lowering.denoiser_of(config)
    return 2 * trees.count(transformer_shapes(denoiser.network))


def assert_gathers_are_few_and_overlapped(p, num_steps=4):
    ratio = p.moved("all-gather") / (num_steps * parameter_bytes())
    overlapped = 1 - p.moved("all-gather", exposed=True) / p.moved("all-gather")
    show(f"{p.topology} {p.remat}: all-gather, x S x bf16 parameters", ratio, 3.1)
    show(f"{p.topology} {p.remat}: all-gather overlapped", 100 * overlapped, 90, "%")
    assert ratio <= 3.1 and overlapped >= 0.90


def test_every_mesh_that_has_as_many_devices_is_laid_out():
    """Axes may share a physical one, and slices split the axis data."""
    script = """
        from jax.experimental import topologies
        from dopsd_jax.core import sharding

        def devices(name, **more):
            return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices

        chips = devices("v6e:8x8")
        for sizes in ((1, 64, 1), (4, 16, 1), (16, 4, 1), (2, 32, 1), (2, 16, 2)):
            mesh = sharding.make_mesh(*sizes, devices=chips)
            assert mesh.devices.shape == sizes and len(set(mesh.devices.flat)) == 64
        slices = devices("v5e:4x4", num_slices=2)
        mesh = sharding.make_mesh(-1, 16, 1, devices=slices)
        print("slices", [{d.slice_index for d in row.flat} for row in mesh.devices])
        try:
            sharding.make_mesh(1, 32, 1, devices=slices)
        except ValueError as e:
            print(e)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True,
        check=False, env=compiler.child_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "slices [{0}, {1}]" in done.stdout
    assert "mesh.data: expected a multiple of 2, the number of slices, got 1" in done.stdout


def test_lora_on_16_v5e_chips_fits_and_overlaps():
    assert_within(4.5, "lora", "v5e:4x4")
    p = planned("lora", "v5e:4x4")
    assert_gathers_are_few_and_overlapped(p)
    show("LoRA, 16 chips: all-reduce, GB per step", p.moved("all-reduce") / 1e9, 1.5)
    assert p.moved("all-reduce") <= 1.5e9


def test_a_full_width_splash_kernel_compiles_for_tpu():
    """To an executable: the plans above stop before kernels are compiled."""
    script = """
        import jax, jax.numpy as jnp
        from jax.experimental import topologies
        from dopsd_jax.core import sharding
        from dopsd_jax.models.attention import attention
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        mesh = sharding.make_mesh(1, 4, 1, devices=topology.devices)
        rows = sharding.batch_sharding(mesh)
        x = jax.ShapeDtypeStruct((4, 4608, 30, 128), jnp.bfloat16, sharding=rows)
        mask = jax.ShapeDtypeStruct((4, 4608), bool, sharding=rows)
        def loss(q, k, v, mask):
            with sharding.use_mesh(mesh):
                return jnp.sum(attention(q, k, v, mask=mask).astype(jnp.float32))
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, mask).compile()
        print("kernels", compiled.as_text().count('custom_call_target="tpu_custom_call"'))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True,
        check=False, env=compiler.child_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "kernels 3" in done.stdout  # forward, dq, dkv


@pytest.mark.tpu
def test_the_text_encoder_splits_over_a_machines_chips():
    """Qwen3-4B, bfloat16, 8 GB, on the four chips of a v5e machine; its layers are gathered."""
    script = """
        import jax, jax.numpy as jnp
        from jax.experimental import topologies
        from dopsd_jax.core import sharding, trees
        from dopsd_jax.models.qwen3 import Qwen3, Qwen3Config
        from dopsd_jax.weights.shapes import text_shapes
        encoder = Qwen3(Qwen3Config.qwen3_4b(), 35, jnp.bfloat16)
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        mesh = sharding.make_mesh(1, 4, 1, devices=topology.devices)
        shapes = text_shapes(encoder)
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s),
            shapes, sharding.shard(mesh, shapes))
        whole = sharding.replicated(mesh)
        ids = jax.ShapeDtypeStruct((1, 512), jnp.int32, sharding=whole)
        mask = jax.ShapeDtypeStruct((1, 512), bool, sharding=whole)
        def features(params, ids, mask):
            with sharding.use_mesh(mesh):
                return encoder.apply({"params": params}, ids, mask, (35,))
        memory = jax.jit(features).lower(params, ids, mask).compile().memory_analysis()
        print("share", memory.argument_size_in_bytes / (2 * trees.count(shapes)))
        print("temporaries", memory.temp_size_in_bytes / 2**30)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True,
        check=False, env=compiler.child_environment(),
    )
    assert done.returncode == 0, done.stderr
    told = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    show("Qwen3-4B on v5e:2x2: share of the weights per chip", float(told["share"]), 0.26)
    show("Qwen3-4B on v5e:2x2: temporaries", float(told["temporaries"]), 1, " GiB")
    assert float(told["share"]) <= 0.26 and float(told["temporaries"]) <= 1


@pytest.mark.tpu
@pytest.mark.parametrize("topology,batch,bar", [
    ("v5e:2x2", 1, 8), ("v5e:16x16", 1, 3.5), ("v6e:4x4", 4, 13),
])
def test_lora_fits(topology, batch, bar):
    assert_within(bar, "lora", topology, batch)


@pytest.mark.tpu
def test_gathers_of_v6e_overlap():
    assert_gathers_are_few_and_overlapped(planned("lora", "v6e:4x4", 4))


@pytest.mark.tpu
def test_gathers_of_v5p_overlap():
    assert_gathers_are_few_and_overlapped(planned("lora", "v5p:2x2x4"))


@pytest.mark.tpu
@pytest.mark.parametrize("topology,bar,changes", [
    ("v5e:4x4", 13.75, {}),
    ("v5e:4x4", 11, {"moments_dtype": "bfloat16", "ema_dtype": "bfloat16"}),
    ("v5p:2x2x1", 50, {}),
])
def test_full_fine_tuning_fits(topology, bar, changes):
    assert_within(bar, "full", topology, **changes)


@pytest.mark.tpu
def test_full_fine_tuning_adds_up_little_at_once():
    p = planned("full", "v5e:4x4")
    show("full, 16 chips: all-reduce, GB per step", p.moved("all-reduce") / 1e9, 2)
    assert p.moved("all-reduce") <= 2e9


@pytest.mark.tpu
def test_temporaries_do_not_grow_with_the_number_of_steps():
    two, eight = (planned("lora", "v5e:4x4", num_steps=n) for n in (2, 8))
    a, b = (p.total - p.weights - p.state for p in (two, eight))
    show("LoRA, v5e:4x4: temporaries, S = 8 against S = 2", 100 * (b / a - 1), 5, "%")
    assert b <= 1.05 * a


@pytest.mark.tpu
@pytest.mark.parametrize("topology,bar", [("v5e:4x4", 40), ("v5p:2x2x4", 50), ("v6e:4x4", 45)])
def test_estimated_utilisation(topology, bar):
    """Of the best policy that fits; see docs/planning.md for what bounds it."""
    p = planned("lora", topology, remat="matmuls")
    assert p.fits, p.total
    show(f"{name('lora', topology, remat='matmuls')}: estimated MFU", 100 * p.mfu, bar, "%")
    print(f"| | {p.total / GIB:.2f} GiB, {p.seconds:.2f} s per step | |")
    if 100 * p.mfu < bar:
        pytest.xfail(f"{topology}: estimated {100 * p.mfu:.1f}%, the bar is {bar}%")


@pytest.mark.tpu
@pytest.mark.parametrize("family,direction,side", vae_memory.CASES)
def test_the_vae_takes_two_gib(family, direction, side):
    found = vae_memory.temporaries(vae_memory.TPU, family, direction, side)
    assert found <= vae_memory.BAR
