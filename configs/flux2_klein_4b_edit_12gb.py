"""As flux2_klein_4b_edit.py on one card of 12 GB: frozen weights in int8.

    python -m dopsd_jax.train --config configs/flux2_klein_4b_edit_12gb.py --workdir runs/b \
        --config.model=FLUX.2-klein-4B --config.data=photos

By XLA's GPU compiler for an RTX 4070 and remat=full, GiB: encoding captions 6.24 and pictures 7.27,
updates 5.98, drawing 7.50, decoding 6.10, of 10.15 that a run may need.
"""

from configs import flux2_klein_4b_edit


def get_config():
    c = flux2_klein_4b_edit.get_config()
    c.batch_size = 1
    c.base_dtype = "int8"
    return c
