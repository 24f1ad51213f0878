"""Stage 1: the VAE, 64 x 64 pixels to 16 x 16 x 16."""

from configs.mini.common import base


def get_config():
    c = base()
    c.objective = "vae"
    c.model, c.vlm = "runs/mini/blank/pipeline", "runs/mini/blank/qwen3_vl"
    c.batch_size = 8
    c.num_train_steps = 4000
    c.optimizer.decay_steps = 1500
    c.ema_decay = 0.995
    c.kl_weight = 3e-4        # per latent, against the mean squared error per pixel
    return c
