"""As z_image_turbo_lora.py on one card of 16 GB or one TPU v5e chip: the frozen weights in int8.

    python -m dopsd_jax.train --config configs/z_image_turbo_lora_16gb.py --workdir runs/a \
        --config.model=Z-Image-Turbo --config.vlm=Qwen3-VL-4B-Instruct --config.data=photos

One picture per update. By XLA's GPU compiler for an RTX 4080 and remat=full, GiB: encoding 8.51,
updates 11.95, drawing 10.96, decoding 10.59, of 13.54 that a run may need. By the TPU compiler for
v5e:1x1: 8.42, 12.11, 10.81, 10.56, of 14.49.
"""

from configs import z_image_turbo_lora


def get_config():
    c = z_image_turbo_lora.get_config()
    c.batch_size = 1
    c.base_dtype = "int8"
    return c
