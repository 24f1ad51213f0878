"""A quantised base on the mini model: tuned on int8, and the adapter then used on the model itself.

    python -m dopsd_jax.evaluate --config configs/mini_int8.py --workdir runs/int8

Eight seeds of D-OPSD in bfloat16 beside the same eight on int8, from the same pictures and noise,
all drawn on weights that are not quantised. Two CPU cores, no accelerator.
"""

from ml_collections import ConfigDict

from configs import mini_claim


def get_config():
    c = mini_claim.get_config()
    c.methods = ConfigDict({
        "dopsd": {"dtype": "bfloat16"},
        "dopsd on int8": {"dtype": "bfloat16", "base_dtype": "int8"},
    })
    c.learning_rates = (8e-4,)
    c.measure_every = c.num_train_steps
    c.new_style = 1.0        # which none reaches: all are compared at the last update
    c.training_seeds = 8
    c.same_data_methods = ()
    return c
