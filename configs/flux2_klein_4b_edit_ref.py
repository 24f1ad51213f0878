"""D-OPSD LoRA on FLUX.2-klein-4B, image editing: the teacher also sees the target, as the last.

    python -m dopsd_jax.train --config configs/flux2_klein_4b_edit_ref.py --workdir runs/e \
        --config.model=FLUX.2-klein-4B --config.data=edits.jsonl

Rows list references, then the target: {"image_paths": ["before.png", "after.png"], "caption": ..}.
Otherwise as flux2_klein_4b_edit.py; 8 images per update, as in the published code for eight GPUs.
"""

from configs import flux2_klein_4b_edit


def get_config():
    c = flux2_klein_4b_edit.get_config()
    c.recipe = "edit_ref"
    c.batch_size = 8
    return c
