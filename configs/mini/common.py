"""What the three stages of the mini model share. Run them in order: vae, base, turbo.

    bash launch/mini.sh        # all of it, from the shipped emoji to a pipeline directory
"""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    c = ConfigDict()
    c.objective = ""          # vae | flow_matching | step_distillation
    c.model = ""              # pipeline directory to start from
    c.vlm = ""                # Qwen3-VL directory to start from
    c.data = "runs/mini/world"  # from dopsd_jax.mini.build
    c.batch_size = 32
    c.num_train_steps = 1000  # updates
    c.seconds = 0.0           # end sooner than after that many; 0: no limit
    c.ema_decay = 0.999       # per update; the averaged weights are what a stage hands on
    c.seed = 0

    c.optimizer = ConfigDict()
    c.optimizer.optimizer = "muon"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 50
    c.optimizer.decay_steps = 300  # linearly to 0 over the last updates, or over their share
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps = 0.9, 0.99, 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.max_grad_norm = 1.0

    c.log_every = 20          # updates
    c.sample_every = 250      # updates
    c.checkpoint_every = 250  # updates
    c.keep_checkpoints = 2
    return c
