"""The LoRA step and the VAEs at full size by XLA's GPU compiler, for cards that are not there.

    bash launch/test.sh -n 0 -s -m gpu tests/gpu      # needs jax[cuda]; about a minute each

Kernels are not tried against each other, which takes a card: what is asserted follows from the
program alone.
"""

import functools

import pytest

from configs import z_image_turbo_lora
from dopsd_jax import plan
from dopsd_jax.planning import compiler, hlo
from dopsd_jax.planning.chips import GIB
from tests import vae_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not compiler.has_gpu_compiler(), reason="needs jax[cuda]"),
]
LAYERS, STEPS = 30 + 2, 4  # layers that see the image; captions alone are too short for a kernel
WIDTHS = {3840, 10240}


@functools.cache
def planned(device, remat):
    config = z_image_turbo_lora.get_config()
    config.update({"remat": remat, "batch_size": 1, "text_tokens": 128, "teacher_tokens": 512})
    return plan.plan(config, device)


def show(what, found, bar):
    print(f"\n| {what} | {found:.4g} | {bar} |", flush=True)


def runs(p, matches):
    """(instruction, how often it runs) of those that match."""
    program = hlo.parse(p.text)
    return [
        (i, count) for name, count in hlo.executions(program).items()
        for i in program.computations.get(name, ()) if matches(i)
    ]


@pytest.mark.parametrize("device,remat,bar", [
    ("4090", "full", 18.0), ("h100", "full", 18.0), ("h100", "matmuls", 27.0),
])
def test_it_fits(device, remat, bar):
    p = planned(device, remat)
    show(f"LoRA r64, 1024 x 1024, {device}, {remat}: GiB", p.total / GIB, bar)
    assert p.fits and p.total / GIB <= bar


def test_attention_is_cudnns_and_holds_no_matrix_of_tokens():
    p = planned("h100", "full")
    calls = runs(p, lambda i: "__cudnn$fmha" in i.rest)
    # The teacher's, the student's, the same again for the gradient, and the gradient.
    assert sum(count for _, count in calls) == 4 * LAYERS * STEPS
    assert not [i for i, _ in calls if "Bias" in i.rest]  # a mask would be one
    tokens = {4096, 4224, 4608}
    for kind, dims in hlo.array_shapes(p.text):
        assert not (len(dims) > 1 and {dims[-1], dims[-2]} <= tokens), f"{kind}{list(dims)}"


def test_no_weight_is_copied_beside_a_loras_factor():
    """XLA's merger of products would make [3840, 10240 + 64] of a weight and an `a`."""
    for kind, dims in hlo.array_shapes(planned("h100", "full").text):
        wide = [d for d in dims if any(w < d <= w + 3 * 64 for w in WIDTHS)]
        assert not (len(dims) == 2 and wide), f"{kind}{list(dims)}"


@pytest.mark.parametrize("family,direction,side", vae_memory.CASES)
def test_the_vae_takes_two_gib(family, direction, side):
    assert vae_memory.temporaries("4090", family, direction, side) <= vae_memory.BAR
