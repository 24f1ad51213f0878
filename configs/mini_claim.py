"""The claim, measured on the mini model: what D-OPSD and others do to a few-step model.

    python -m dopsd_jax.evaluate --config configs/mini_claim.py --workdir runs/claim

Every method learns the new style of configs/mini_style.py from the same eight pictures, at four
learning rates, from the same noise; then the best rate of each is repeated with more seeds.
Two CPU cores, no accelerator.
"""

from ml_collections import ConfigDict

from dopsd_jax.weights.shipped import UNDISTILLED


def get_config():
    c = ConfigDict()
    c.run_config = "configs/mini_style.py"
    c.style = "blueprint"
    # Name -> what differs from run_config. The first is what the others are compared with.
    c.methods = ConfigDict({
        "dopsd": {},
        "dopsd, frozen teacher": {"teacher": "frozen"},
        "dopsd, live teacher": {"teacher": "live"},
        "off-policy, noised targets": {"states": "noised"},
        "off-policy, teacher's trajectory": {"states": "teacher"},
        "sft": {"objective": "sft"},
        "sft on the undistilled": {"objective": "sft", "base_lora": str(UNDISTILLED)},
    })
    c.learning_rates = (2e-4, 4e-4, 8e-4, 1.6e-3)
    c.num_train_steps = 50
    c.measure_every = 25     # updates; every learning rate is measured as often
    c.new_style = 0.8        # accuracy in the new style at which methods are compared
    c.training_seeds = 3     # of the chosen rates; the sweep has one
    c.generation_seeds = 8   # noises per prompt
    c.old_prompts = 24
    c.prompts = ()           # own ones in their place, each with a style and one or two things
    c.num_steps = 2          # deployed number of denoiser calls
    # What tuning on the model's own training pictures does; no methods: left out.
    c.same_data_methods = ("dopsd", "sft")
    c.same_data_pictures = 64
    c.same_data_rate = 1e-3
    c.checkpoints = ""       # or own runs, "runs/a,runs/b", instead of all of the above
    return c
