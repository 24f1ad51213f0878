"""As flux2_klein_4b_edit.py on one card of 16 GB: one picture per update.

    python -m dopsd_jax.train --config configs/flux2_klein_4b_edit_16gb.py --workdir runs/b \
        --config.model=FLUX.2-klein-4B --config.data=photos

By the TPU compiler for v5e:1x1 and remat=full, GiB: encoding captions 6.12 and pictures 7.52,
updates 9.55, drawing 11.65, decoding 10.05, of 14.49 that a run may need; an RTX 4080's are 13.54.
"""

from configs import flux2_klein_4b_edit


def get_config():
    c = flux2_klein_4b_edit.get_config()
    c.batch_size = 1
    return c
