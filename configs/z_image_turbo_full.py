"""D-OPSD on all weights of Z-Image-Turbo: for large sets of pairs, on 16 TPU chips or more.

    python -m dopsd_jax.train --config configs/z_image_turbo_full.py --workdir runs/a \
        --config.model=Z-Image-Turbo --config.vlm=Qwen3-VL-4B-Instruct --config.data=pairs.jsonl

AdamW and the averaged teacher in float32 take 16 bytes per parameter, 98 GB in all, split over the
devices. `--config.moments_dtype=bfloat16 --config.ema_dtype=bfloat16` takes 10. What it needs and
should take on which chips: `python -m dopsd_jax.plan --config configs/z_image_turbo_full.py
--topology v5e:4x4`. The learning rate is a guess for this size, not a result.
"""

from configs.common import base


def get_config():
    c = base()
    c.trainable = "full"
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 1
    c.batch_size = 16
    c.learning_rate = 1e-6
    c.warmup_steps = 200
    c.num_train_steps = 20000
    c.checkpoint_every = 1000
    return c
