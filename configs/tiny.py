"""The whole loop on a tiny random pipeline: 2 CPU cores, about a minute. For trying things out.

    python -m dopsd_jax.train --config configs/tiny.py --workdir runs/tiny \
        --config.model=DIR/z_image_tiny --config.vlm=DIR/qwen3_vl_tiny --config.data=photos

The weights are random, so the pictures are noise; the files, numbers and curves are real.
"""

from configs.common import base


def get_config():
    c = base()
    c.buckets = "128x128,144x96"
    c.small_buckets = "repeat"
    c.num_train_steps = 60
    c.batch_size = 2
    c.lora.rank, c.lora.alpha = 8, 16.0
    c.learning_rate = 1e-3
    c.ema_decay = 0.99
    c.dtype = "float32"
    c.log_every = 5
    c.sample_every = 30
    c.checkpoint_every = 20
    c.gauge_prompts = ()  # there is nothing to retain,
    c.preflight = "off"   # and nothing to teach
    return c
