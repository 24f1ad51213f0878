"""Stage 2: transformer, text encoder and vision tower together, by flow matching."""

from configs.mini.common import base


def get_config():
    c = base()
    c.objective = "flow_matching"
    c.model, c.vlm = "runs/mini/vae/pipeline", "runs/mini/vae/qwen3_vl"
    c.init = "fresh"          # fresh | model: random weights, or those of the directories
    c.batch_size = 32         # a third of the rows see a picture
    c.num_train_steps = 30000
    c.optimizer.decay_steps = 20000
    c.optimizer.warmup_steps = 200
    c.caption_dropout = 0.1   # share of captions replaced by the empty one, for guidance
    c.pair_caption_dropout = 0.3  # the same beside a picture, which then has to tell all
    return c
