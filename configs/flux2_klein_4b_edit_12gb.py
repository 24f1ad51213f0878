"""As flux2_klein_4b_edit.py on one card of 12 GB: frozen weights in int8.

    python -m dopsd_jax.train --config configs/flux2_klein_4b_edit_12gb.py --workdir runs/b \
        --config.model=FLUX.2-klein-4B --config.data=photos

FIGURES
"""

from configs import flux2_klein_4b_edit


def get_config():
    c = flux2_klein_4b_edit.get_config()
    c.batch_size = 1
    c.base_dtype = "int8"
    return c
