"""As z_image_turbo_lora.py on one card of 12 GB: frozen weights in nf4, rank 16, 768 x 768.

    python -m dopsd_jax.train --config configs/z_image_turbo_lora_12gb.py --workdir runs/a \
        --config.model=Z-Image-Turbo --config.vlm=Qwen3-VL-4B-Instruct --config.data=photos

One picture per update. By XLA's GPU compiler for an RTX 4070 and remat=full, GiB: encoding 8.51,
updates 5.68, drawing 5.33, decoding 5.07, of 10.15 that a run may need. By the TPU compiler for
v5e:1x1: 8.42, 5.78, 5.10, 4.88.
"""

from configs import z_image_turbo_lora


def get_config():
    c = z_image_turbo_lora.get_config()
    c.batch_size = 1
    c.base_dtype = "nf4"
    c.resolution = 768
    c.lora.rank, c.lora.alpha = 16, 32.0
    return c
