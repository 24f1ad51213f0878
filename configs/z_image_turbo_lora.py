"""D-OPSD LoRA on Z-Image-Turbo, the published recipe: teacher = prompt and target image.

    python -m dopsd_jax.train --config configs/z_image_turbo_lora.py --workdir runs/a \
        --config.model=Z-Image-Turbo --config.vlm=Qwen3-VL-4B-Instruct --config.data=photos

Rank 64, alpha 128, 238 linears (158,760,960 parameters), 4 rollout steps, 2000 updates of 4
images at 1024^2, as in the published code for four GPUs.
"""

from configs.common import base


def get_config():
    return base()
