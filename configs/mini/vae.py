"""Stage 1: the VAE, 64 x 64 pixels to 16 x 16 x 4."""

from configs.mini.common import base


def get_config():
    c = base()
    c.objective = "vae"
    c.model, c.vlm = "runs/mini/blank/pipeline", "runs/mini/blank/qwen3_vl"
    c.num_train_steps = 3000
    c.optimizer.decay_steps = 1000
    c.ema_decay = 0.995
    c.kl_weight = 5e-4        # per latent, against the mean squared error per pixel
    return c
