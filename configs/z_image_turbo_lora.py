"""D-OPSD LoRA on Z-Image-Turbo, the published recipe: teacher = prompt and target image.

    python -m dopsd_jax.train --config configs/z_image_turbo_lora.py --workdir runs/a \
        --config.model=Z-Image-Turbo --config.vlm=Qwen3-VL-4B-Instruct --config.data=photos

Rank 64, alpha 128, 238 linears (158,760,960 parameters), 4 rollout steps, 2000 updates of 4
images at 1024^2, as in the published code for four GPUs. The frozen weights are split over all
devices (mesh.fsdp = -1): on four v5e chips the run needs 6.4 GiB of each, on 16 or more less.
"""

from configs.common import base


def get_config():
    c = base()
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 1
    return c
