"""Whole runs on cards of 24, 16 and 12 GB by XLA's GPU compiler: every phase below its bar.

    bash launch/test.sh -n 0 -s -m gpu tests/gpu/test_gpu_fit.py      # needs jax[cuda]; 4 min each
"""

import pytest

from configs import (
    flux2_klein_4b_edit_12gb,
    flux2_klein_9b_edit,
    z_image_turbo_lora_12gb,
    z_image_turbo_lora_16gb,
    z_image_turbo_lora_24gb,
)
from dopsd_jax import plan
from dopsd_jax.planning import compiler
from dopsd_jax.planning.chips import GIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not compiler.has_gpu_compiler(), reason="needs jax[cuda]"),
]


@pytest.mark.parametrize("module,device,changes,bar", [
    (z_image_turbo_lora_24gb, "4090", {}, 20.5),
    (z_image_turbo_lora_16gb, "4080", {}, 13.5),
    (z_image_turbo_lora_12gb, "4070", {}, 10.0),
    (flux2_klein_4b_edit_12gb, "4070", {}, 10.0),
    (flux2_klein_9b_edit, "4090", {"base_dtype": "int8", "batch_size": 1}, 20.5),
], ids=["z 24", "z 16", "z 12", "klein 4B 12", "klein 9B 24"])
def test_a_whole_run_fits(module, device, changes, bar):
    config = module.get_config()
    config.update({"remat": "full"} | changes)
    p = plan.plan(config, device, all_phases=True)
    found = ", ".join(f"{phase.name} {phase.total / GIB:.2f}" for phase in p.phases)
    print(f"\n| {module.__name__} | {device} | {found} | {bar} |", flush=True)
    assert p.fits and p.needed / GIB <= bar
