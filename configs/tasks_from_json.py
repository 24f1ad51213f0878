"""A sequence of tasks from a JSON file, for programs that make sequences; see mini_tasks.py.

    python -m dopsd_jax.tasks --config configs/tasks_from_json.py:runs/a.json --workdir runs/a
"""

import json
from pathlib import Path

from ml_collections import ConfigDict


def get_config(file: str):
    return ConfigDict(json.loads(Path(file).read_text()))
