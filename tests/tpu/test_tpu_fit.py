"""Whole runs on one TPU v5e chip by its compiler: every phase of a run below its bar.

    bash launch/test.sh -n 0 -s -m tpu tests/tpu/test_tpu_fit.py      # 15 s of CPU a program
"""

import pytest

from configs import flux2_klein_4b_edit_12gb, z_image_turbo_lora_12gb, z_image_turbo_lora_16gb
from dopsd_jax import plan
from dopsd_jax.planning import compiler
from dopsd_jax.planning.chips import GIB

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        not compiler.has_tpu_compiler(), reason="libtpu is not installed: pip install -e '.[test]'"
    ),
]


@pytest.mark.parametrize("module,bar", [
    (z_image_turbo_lora_16gb, 13.5), (z_image_turbo_lora_12gb, 10.0),
    (flux2_klein_4b_edit_12gb, 10.0),
], ids=["z 16", "z 12", "klein 4B 12"])
def test_a_whole_run_fits_one_chip(module, bar):
    config = module.get_config()
    config.remat = "full"
    p = plan.plan(config, "v5e:1x1", all_phases=True)
    found = ", ".join(f"{phase.name} {phase.total / GIB:.2f}" for phase in p.phases)
    print(f"\n| {module.__name__} | v5e:1x1 | {found} | {bar} |", flush=True)
    assert p.fits and p.needed / GIB <= bar
