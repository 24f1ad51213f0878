"""As flux2_klein_4b_edit.py on one card of 16 GB: one picture per update.

    python -m dopsd_jax.train --config configs/flux2_klein_4b_edit_16gb.py --workdir runs/b \
        --config.model=FLUX.2-klein-4B --config.data=photos

FIGURES
"""

from configs import flux2_klein_4b_edit


def get_config():
    c = flux2_klein_4b_edit.get_config()
    c.batch_size = 1
    return c
