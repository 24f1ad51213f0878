"""As flux2_klein_4b_edit.py on FLUX.2-klein-9B: 64 linears, 33,554,432 parameters.

    python -m dopsd_jax.train --config configs/flux2_klein_9b_edit.py --workdir runs/b \
        --config.model=FLUX.2-klein-9B --config.data=photos
"""

from configs import flux2_klein_4b_edit


def get_config():
    c = flux2_klein_4b_edit.get_config()
    c.published = "flux2_klein_9b"
    return c
