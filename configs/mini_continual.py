"""Five styles one after another on the mini model, by several methods, in two orders.

    python -m dopsd_jax.continual --config configs/mini_continual.py --workdir runs/continual

Each method learns every style from eight pictures. Learning rates are chosen by one seed and one
order; the figures are of other seeds, half of them in each order.
"""

from ml_collections import ConfigDict

from configs.mini_tasks import PROMPTS
from dopsd_jax.weights.shipped import UNDISTILLED

# Enough for these prompts, and a sixth less to compute; a warm-up for tasks of 25 updates.
SHORT = {"text_tokens": 32, "warmup_steps": 5}
UNTUNED = SHORT | {"teacher": "untuned"}
KEEP = {"keep_prompts": str(PROMPTS), "keep_share": 0.25}
ANCHOR = {"anchor": 0.1}
SFT = SHORT | {"objective": "sft"}
# One for all: of 8e-4, 1.6e-3 and 3.2e-3 the best of D-OPSD with keeping, and of 4e-4, 8e-4 and
# 1.6e-3 the one at which SFT learns most, by the seed that chooses. Without a learning_rate of its
# own a method is given the best of `learning_rates`.
RATE = 1.6e-3


def get_config():
    c = ConfigDict()
    c.run_config = "configs/mini_style.py"  # what every task starts from
    c.judge = ""             # a judge's file that knows the styles; by default of today's world
    c.orders = (
        ("chalk", "blueprint", "thermal", "sepia", "stitch"),
        ("stitch", "sepia", "thermal", "blueprint", "chalk"),
    )
    # The word for a style in captions, where it is not its name. The mini model's text encoder
    # hears most names that it was not trained on as one, and no method could draw two of these
    # styles apart; words that it knows, and blueprint, it can tell.
    c.called = ConfigDict({"chalk": "green", "sepia": "orange", "stitch": "pink"})
    c.pictures = 8           # of each style
    # Name -> how its sequences go on (carry, keep_earlier, replay_share), keys of a run that differ
    # (changes), its learning_rate, where none is to be chosen, and rehearsal: the share of rows
    # that are pictures which the untuned model drew. The first by name is what the others are
    # compared with.
    c.methods = ConfigDict({
        "dopsd, keeping": {"changes": UNTUNED | KEEP, "learning_rate": RATE},
        "dopsd": {"changes": UNTUNED, "learning_rate": RATE},
        "dopsd, anchor": {"changes": UNTUNED | ANCHOR, "learning_rate": RATE},
        "dopsd, keeping and anchor": {
            "changes": UNTUNED | KEEP | ANCHOR, "learning_rate": RATE,
        },
        "sft": {"changes": SFT, "learning_rate": RATE},
        "sft, rehearsal": {"changes": SFT, "rehearsal": 0.25, "learning_rate": RATE},
        "off-policy, noised targets": {
            "changes": UNTUNED | {"states": "noised"}, "learning_rate": RATE,
        },
        "sft on the undistilled": {
            "changes": SFT | {"base_lora": str(UNDISTILLED)}, "learning_rate": RATE,
        },
    })
    c.carry = "adapter"      # adapter | stack | full, as of a sequence of tasks
    c.replay_share = 0.5     # of the pictures, those of earlier tasks
    c.learning_rates = (4e-4, 8e-4, 1.6e-3)
    c.new_style = 0.8        # accuracy right after its task, of rates that may be chosen
    c.num_train_steps = 25   # of every task
    c.training_seeds = 8     # none of which chose a rate; they take the orders by turns
    c.num_steps = 2          # deployed number of denoiser calls
    c.old_prompts = 500      # after the last task: what it takes to tell .03 with 8 trainings
    c.old_along = 25         # the first of them, after every task
    c.style_things = 12      # of a style, which no picture that is learned from shows
    c.generation_seeds = 1   # noises per prompt; more prompts tell more than more noises
    return c
