"""Stage 3: the transformer distilled to two steps without guidance."""

from configs.mini.common import base


def get_config():
    c = base()
    c.objective = "step_distillation"
    c.model, c.vlm = "runs/mini/base/pipeline", "runs/mini/base/qwen3_vl"
    c.student = ""            # undistilled_lora.safetensors of an earlier run, to go on from it
    c.num_steps = 2           # denoiser calls of the finished model
    c.substeps = 3            # of the teacher within each of them
    c.guidance = 3.5          # of the teacher; becomes part of the student
    c.matching = 4.0          # weight of the matching of distributions; 0 for none
    c.last_regression = 1.0   # weight of the last step's path, beside that matching
    c.critic_rate = 3.0       # learning rate of the critic that this takes, in the student's
    c.rank = 32               # of the LoRA that is folded in when done
    c.batch_size = 16
    c.num_train_steps = 2000
    c.optimizer.optimizer = "adamw"
    c.optimizer.learning_rate = 5e-4
    c.optimizer.warmup_steps = 20
    c.optimizer.decay_steps = 600
    c.ema_decay = 0.98
    return c
