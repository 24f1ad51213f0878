"""As flux2_klein_4b_edit.py on one card of 24 GB: one picture per update.

    python -m dopsd_jax.train --config configs/flux2_klein_4b_edit_24gb.py --workdir runs/b \
        --config.model=FLUX.2-klein-4B --config.data=photos

It is the config for 16 GB: with more memory, remat=auto computes less of a layer again.
"""

from configs import flux2_klein_4b_edit_16gb


def get_config():
    return flux2_klein_4b_edit_16gb.get_config()
