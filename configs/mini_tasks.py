"""Two styles after one another on the mini model, with rows that keep what it knew.

    python -m dopsd_jax.mini.build --style chalk --called green --out runs/styles/chalk
    python -m dopsd_jax.mini.build --style thermal --out runs/styles/thermal
    python -m dopsd_jax.tasks --config configs/mini_tasks.py --workdir runs/tasks
"""

from pathlib import Path

from ml_collections import ConfigDict

import dopsd_jax

PROMPTS = Path(dopsd_jax.__file__).parent / "assets" / "mini_prompts.txt"


def get_config():
    c = ConfigDict()
    c.run_config = "configs/mini_style.py"  # what every task starts from
    # adapter: one LoRA carried along; stack: a new LoRA on top of frozen ones; full: all weights.
    c.carry = "adapter"
    # Share of the rows with pictures that are those of earlier tasks, equally much of each.
    c.replay_share = 0.5
    # Rows that keep (keep_share) also take the prompts of earlier tasks, and hold on to the model
    # that each task began with instead of the untuned one: where no earlier picture may be trained
    # on again. Their folders must still be there: a changed history is refused.
    c.keep_earlier = False
    # Keys of run_config that differ in every task.
    c.changes = ConfigDict({
        "teacher": "untuned", "keep_prompts": str(PROMPTS), "keep_share": 0.25,
    })
    # In order. A task has a name, and any keys of a run that differ: its data, its recipe, ..
    c.tasks = (
        {"name": "chalk", "data": "runs/styles/chalk"},
        {"name": "thermal", "data": "runs/styles/thermal"},
    )
    return c
