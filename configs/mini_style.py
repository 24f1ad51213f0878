"""D-OPSD on the mini model: a style it was never trained on, from 8 pictures, in minutes on a CPU.

    python -m dopsd_jax.train --config configs/mini_style.py --workdir runs/style
"""

from pathlib import Path

import dopsd_jax
from configs.common import base

PICTURES = Path(dopsd_jax.__file__).parent / "assets" / "mini_style"


def get_config():
    c = base()
    c.model = c.vlm = "mini"
    c.data = str(PICTURES)
    c.buckets = "64x64"
    c.text_tokens = c.teacher_tokens = 64
    c.vlm_min_pixels = c.vlm_max_pixels = 64 * 64
    c.num_steps = c.sample_steps = 2
    c.lora.rank, c.lora.alpha = 16, 32.0
    c.num_train_steps = 100
    c.batch_size = 8
    c.learning_rate = 3e-4
    c.warmup_steps = 10
    c.ema_decay = 0.999
    c.dtype = "float32"
    c.remat = "none"
    c.sample_rows = 8
    c.sample_every = 25
    c.checkpoint_every = 25
    c.sample_prompts = (
        "a cat, blueprint style", "a rocket, blueprint style", "a big star, blueprint style",
        "a mushroom and a small cactus, blueprint style", "a red umbrella, noto style",
        "a big cake, pastel style", "a panda, neon style", "a frog and a key, sticker style",
    )
    c.gauge_prompts = (
        "a banana, noto style", "a rocket, night style", "a hamburger, sticker style",
        "a butterfly, neon style", "an umbrella, ink style", "a panda, pastel style",
    )
    return c
