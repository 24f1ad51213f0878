"""D-OPSD LoRA on FLUX.2-klein-4B, text-to-image: teacher = editing branch, target as reference.

    python -m dopsd_jax.train --config configs/flux2_klein_4b_edit.py --workdir runs/b \
        --config.model=FLUX.2-klein-4B --config.data=photos

Rank 64, alpha 128, the 40 linears that the published list of names really matches (15,728,640
parameters), 4 rollout steps on the sampler's own schedule, 3001 updates of 4 images at 1024^2, as
in the published code for four GPUs. The published schedule is --config.schedule=reference.
"""

from configs.common import base


def get_config():
    c = base()
    c.published = "flux2_klein_4b"
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 1
    c.recipe = "edit"
    c.teacher_tokens = 512
    c.learning_rate = 2e-5
    c.num_train_steps = 3001
    return c
