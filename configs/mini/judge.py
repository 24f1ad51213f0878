"""The judge of the mini model's pictures; trained on real pictures alone."""

from configs.mini.common import base


def get_config():
    c = base()
    c.objective = "judge"
    c.model, c.vlm = "runs/mini/blank/pipeline", "runs/mini/blank/qwen3_vl"
    c.batch_size = 96
    c.num_train_steps = 3000
    c.optimizer.decay_steps = 1500
    c.ema_decay = 0.99
    return c
