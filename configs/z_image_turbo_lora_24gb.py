"""As z_image_turbo_lora.py on one card of 24 GB, such as an RTX 4090: one picture per update.

    python -m dopsd_jax.train --config configs/z_image_turbo_lora_24gb.py --workdir runs/a \
        --config.model=Z-Image-Turbo --config.vlm=Qwen3-VL-4B-Instruct --config.data=photos

By XLA's GPU compiler for an RTX 4090, GiB: encoding 8.51, updates 17.67 (18.57 with the policy
`attention`, which remat=auto takes), drawing 16.67, decoding 16.31, of 20.30 that a run may need.
"""

from configs import z_image_turbo_lora


def get_config():
    c = z_image_turbo_lora.get_config()
    c.batch_size = 1
    return c
