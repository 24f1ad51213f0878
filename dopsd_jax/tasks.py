"""Command: one task after another on the same model, each a run of its own that stands on the last.

    python -m dopsd_jax.tasks --config configs/mini_tasks.py --workdir runs/tasks

Every task is an ordinary run in <workdir>/1_NAME, 2_NAME, ..; run the same command again and it
continues inside any of them. Tasks may be added at the end later. What was done cannot be changed:
another order, other data or settings of a task on which later ones stand are refused.

Writes <workdir>/tasks.md and report.html: what was kept of every earlier task after each.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dopsd_jax import report
from dopsd_jax import train as train_lib
from dopsd_jax.compare import matrix as matrix_lib
from dopsd_jax.core import cli, distributed, mirror
from dopsd_jax.core.checks import is_number, is_whole, noted
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import log
from dopsd_jax.data.datasets import parse_data, read_data
from dopsd_jax.method import contexts
from dopsd_jax.run import loop
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.run.config import check_config, needs_of_rows
from dopsd_jax.run.loras import CARRIES

FLAGS = flags.FLAGS
HISTORY = "tasks.json"
# Of a task's run, made here.
OWN_KEYS = ("base_lora", "init_lora", "init_full", "trainable", "earlier_data")
MOST_PROMPTS = 1000  # of an earlier task's data that are kept
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Attributes:
        name: Of letters, digits, - and _.
        workdir: Of its run.
        config: Of its run, complete.
        own: Its config but for what is kept and replayed of earlier tasks.
    """

    name: str
    workdir: Path
    config: ConfigDict
    own: ConfigDict


def planned(config: ConfigDict, workdir: Path) -> list[Task]:
    """The runs of a sequence.

    Args:
        config: See configs/mini_tasks.py: run_config, carry, keep_earlier, changes, tasks.
        workdir: Of the sequence.

    Raises:
        ValueError: Everything that is wrong with the sequence itself, together; each run's own
            config is checked when it starts.
    """
    problems = []
    if config.carry not in CARRIES:
        problems.append(f"carry: expected one of {tuple(CARRIES)}, got {config.carry!r}")
    tasks = [dict(task) for task in config.tasks]
    names = [task.get("name") for task in tasks]
    if not tasks:
        problems.append("tasks: expected at least one, got none")
    for i, name in enumerate(names, 1):
        if not isinstance(name, str) or not NAME.fullmatch(name):
            problems.append(f"tasks: expected a name of a-z, 0-9, - and _ for task {i}, got "
                            f"{name!r}")
    if len(set(names)) < len(names):
        problems.append(f"tasks: expected different names, got {', '.join(map(str, names))}")
    if problems:
        raise ValueError("config:\n  " + "\n  ".join(problems))
    common = cli.load_config(config.run_config, flag="config.run_config")
    if common.get("trainable") is None:
        raise ValueError(f"run_config: expected the config of a run, got {config.run_config}")
    found: list[Task] = []
    for i, task in enumerate(tasks, 1):
        changes = _flat(config.changes) | _flat({k: v for k, v in task.items() if k != "name"})
        known = cli.config_keys(common)
        for key in changes:
            if key not in known:
                problems.append(f"task {i} ({task['name']}): {key}: no key of a run")
            elif key in OWN_KEYS and i > 1:
                problems.append(f"task {i} ({task['name']}): {key}: expected none, it follows from "
                                "carry and the tasks before")
        if problems:
            continue
        run = common.copy_and_resolve_references()
        try:
            run.update_from_flattened_dict(changes)
        except (TypeError, ValueError) as e:  # a number where a text stands, and the like
            problems.append(f"task {i} ({task['name']}): {e}")
            continue
        wanted = CARRIES[config.carry]
        if changes.get("trainable", wanted) != wanted:
            problems.append(f"task {i} ({task['name']}): trainable: expected {wanted}, as carry = "
                            f"{config.carry} has it, got {changes['trainable']!r}")
        run.trainable = wanted
        _stand_on(run, config.carry, found)
        if config.carry == "stack" and found and run.preview_model:
            problems.append(f"task {i} ({task['name']}): preview_model: expected none with carry = "
                            "stack; the LoRAs of earlier tasks are not moved to it")
        own = run.copy_and_resolve_references()
        with noted(problems, f"task {i} ({task['name']})"):
            _remember(run, found, keep=config.get("keep_earlier", False),
                      replay=config.get("replay_share", 0.0))
        found.append(Task(task["name"], workdir / f"{i}_{task['name']}", run, own))
    if problems:
        raise ValueError("config:\n  " + "\n  ".join(problems))
    return found


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"lora": {"rank": 8}} and {"lora.rank": 8} alike as the latter."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict | ConfigDict):
            found |= {f"{key}.{inner}": x for inner, x in _flat(value).items()}
        else:
            found[key] = value
    return found


def _stand_on(run: ConfigDict, carry: str, earlier: Sequence[Task]) -> None:
    """Puts into a run's config what it stands on or goes on from."""
    if not earlier:
        return
    if contexts.RECIPES[run.recipe].shown(contexts.STUDENT, 1):
        log.info("recipe %s: previews draw no earlier task; the student needs references to draw",
                 run.recipe)
    else:
        run.earlier_data = ";".join(task.own.data for task in earlier)
    last = str(earlier[-1].workdir)
    if carry == "stack":
        first = earlier[0].config.base_lora  # what the whole sequence stands on, if anything
        run.base_lora = ",".join(filter(None, [first, *(str(t.workdir) for t in earlier)]))
    elif carry == "adapter":
        run.base_lora, run.init_lora = earlier[-1].config.base_lora, last
    else:
        run.init_full = last


def _remember(run: ConfigDict, earlier: Sequence[Task], *, keep: bool, replay: float) -> None:
    """Puts into a run's config the prompts and the pictures of earlier tasks.

    Args:
        run: Its config, which is changed.
        earlier: May be none.
        keep: Whether the rows that keep take their prompts.
        replay: Share of the rows with pictures that are theirs, equally much of each.

    Raises:
        ValueError: What the run's own keys do not allow.
    """
    if not is_number(replay) or not 0 <= replay < 1:
        raise ValueError(f"replay_share: expected a share in [0, 1), got {replay!r}")
    if keep and earlier:
        if not run.keep_share:
            raise ValueError("keep_share: expected a share above 0 with keep_earlier, got 0")
        # Of prompts that earlier tasks taught, the untuned model knows nothing.
        run.keep_prompts = ",".join(filter(None, [
            run.keep_prompts, *(str(prompts_of(task)) for task in earlier)
        ]))
        run.retain = "start"
    if replay and earlier:
        if others := sorted({t.own.recipe for t in earlier} - {run.recipe}):
            raise ValueError(f"recipe: expected that of the tasks whose pictures are replayed, "
                             f"{', '.join(others)}, got {run.recipe}")
        shares = {name: (1 - replay) * share for name, share in _shares(run).items()}
        for task in earlier:
            for name, share in _shares(task.own).items():
                shares[name] = shares.get(name, 0.0) + share * replay / len(earlier)
        run.data, run.data_weights = ",".join(shares), ",".join(f"{x:.6g}" for x in shares.values())


def _shares(run: ConfigDict) -> dict[str, float]:
    """Data set -> its share of a run's pictures.

    Raises:
        ValueError: Several that have no weights; how many rows they hold is not known yet.
    """
    sets, weights = parse_data(run.data, run.data_weights)
    if weights is None and len(sets) > 1:
        raise ValueError("data_weights: expected those of several data sets with replay_share, "
                         "got none")
    weights = weights or [1.0]
    return {name: weight / sum(weights) for name, weight in zip(sets, weights, strict=True)}


def check(tasks: Sequence[Task]) -> None:
    """Refuses what can be known to fail later, before the first task takes its hours.

    Raises:
        ValueError: Every impossible value of every task's config, and data that is not there.
    """
    problems = []
    for i, task in enumerate(tasks, 1):
        config = task.config.copy_and_resolve_references()
        # What tasks hand on is not there yet.
        config.base_lora = tasks[0].config.base_lora
        config.init_lora = config.init_full = config.earlier_data = ""
        config.keep_prompts = task.own.keep_prompts
        if not config.keep_prompts and task.config.keep_prompts:
            config.keep_share = 0.0
        with noted(problems, f"task {i} ({task.name})"):
            _check_kind(task, tasks[: i - 1])
            check_config(config)
            for data in parse_data(config.data, config.data_weights)[0]:
                if not Path(data).expanduser().exists():
                    raise ValueError(f"data: found none at {data}")
    if problems:
        raise ValueError("\n".join(problems))


def _check_kind(task: Task, earlier: Sequence[Task]) -> None:
    """Raises ValueError for an adapter that cannot stand on those of the tasks before it."""
    kind, kinds = task.config.lora.kind, [t.config.lora.kind for t in earlier]
    if task.config.init_lora and kinds and kind != kinds[-1]:
        raise ValueError(f"lora.kind: expected {kinds[-1]}, as of the task that this one goes on "
                         f"from, got {kind}")
    stacked = any(str(t.workdir) in task.config.base_lora.split(",") for t in earlier)
    if stacked and "dora" in (kind, *kinds):
        raise ValueError("lora.kind: expected lora or lokr in every task with carry = stack; a "
                         "DoRA sets how long the columns of the whole weight are and adds up with "
                         "nothing")


def prompts_of(task: Task) -> Path:
    """The file of a task's prompts, which later ones keep."""
    return task.workdir.with_name(f"keep_{task.workdir.name}.txt")


def write_prompts(task: Task) -> None:
    """Writes the captions of a task's data, at most MOST_PROMPTS of them, evenly spaced."""
    rows = read_data(task.own, needs_of_rows(task.own)).rows
    every = max(len(rows) / MOST_PROMPTS, 1)
    chosen = (rows[int(i * every)] for i in range(min(len(rows), MOST_PROMPTS)))
    prompts = [" ".join(next(iter(row.captions.values())).split()) for row in chosen]
    write_atomic(prompts_of(task), "".join(f"{p}\n" for p in prompts))


def claim(config: ConfigDict, tasks: Sequence[Task], workdir: Path) -> None:
    """Takes the workdir for a sequence, or checks it against the one that is there.

    Raises:
        ValueError: Tasks that were begun in another order or under other names, another way to go
            on, or another number of updates of a task on which a later one stands.
    """
    def done(task: Task) -> int:
        return max(workdir_lib.saved_steps(task.workdir), default=0)

    file = workdir / HISTORY
    begun: list[dict[str, Any]] = []
    if file.is_file():
        history = _read(file)
        begun = history["tasks"]
        if history["carry"] != config.carry:
            raise ValueError(
                f"{workdir}: holds tasks with carry = {history['carry']}, now {config.carry}; "
                "choose another --workdir"
            )
    elif workdir.is_dir() and any(not p.name.startswith(".") for p in workdir.iterdir()):
        raise ValueError(f"{workdir}: holds other things than tasks; choose a new --workdir")
    problems = []
    for i, old in enumerate(begun):
        if i >= len(tasks) or tasks[i].name != old["name"]:
            now = tasks[i].name if i < len(tasks) else "none"
            problems.append(f"task {i + 1}: was {old['name']}, now {now}")
        elif i + 1 == len(begun) < len(tasks) and done(tasks[i]) > tasks[i].config.num_train_steps:
            problems.append(
                f"task {i + 1} ({old['name']}): {done(tasks[i])} updates are done, now "
                f"num_train_steps is {tasks[i].config.num_train_steps}, and task {i + 2} would "
                "stand on it"
            )
        elif i + 1 < len(begun) and tasks[i].config.num_train_steps != old["num_train_steps"]:
            problems.append(
                f"task {i + 1} ({old['name']}): num_train_steps was {old['num_train_steps']}, now "
                f"{tasks[i].config.num_train_steps}, and task {i + 2} stands on it"
            )
    if problems:
        raise ValueError(
            f"{workdir}: another history than the config's; what was done cannot be changed, only "
            "added to:\n  " + "\n  ".join(problems)
        )


def _read(file: Path) -> dict[str, Any]:
    """tasks.json: {"carry", "tasks": [{"name", "num_train_steps"}]} of the tasks that were begun.

    Raises:
        ValueError: Not such a file.
    """
    try:
        values = json.loads(file.read_text())
        good = isinstance(values["carry"], str) and all(
            isinstance(t["name"], str) and is_whole(t["num_train_steps"]) for t in values["tasks"]
        )
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{file}: damaged; restore it, or choose another --workdir")
    return values


def _begin(config: ConfigDict, tasks: Sequence[Task], file: Path) -> None:
    """Writes down that the last of these tasks is begun; what is there may name later ones."""
    begun = [{"name": t.name, "num_train_steps": int(t.config.num_train_steps)} for t in tasks]
    if file.is_file() and len(_read(file)["tasks"]) >= len(begun):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps({"carry": config.carry, "tasks": begun}, indent=2) + "\n")


def run(config: ConfigDict, workdir: str | Path) -> list[Task]:
    """Runs a sequence to its end, or continues it; returns its tasks.

    Raises:
        ValueError: A bad config, or another history than the workdir's; whatever `train` raises.
        loop.TrainingError: As `train`.
    """
    if mirror.is_remote(workdir):
        raise ValueError(f"--workdir: expected a directory of this machine, got {workdir}; tasks "
                         "read each other's checkpoints")
    if "," in str(workdir):
        raise ValueError(f"--workdir: expected a path without a comma, got {workdir}")
    workdir = Path(workdir)
    tasks = planned(config, workdir)
    check(tasks)
    distributed.on_main(lambda: claim(config, tasks, workdir))
    for i, task in enumerate(tasks, 1):
        distributed.on_main(lambda i=i: _begin(config, tasks[:i], workdir / HISTORY))
        if task.config.keep_prompts != task.own.keep_prompts:
            distributed.on_main(lambda i=i: write_prompts(tasks[i - 2]))
        log.info("task %d of %d: %s, in %s", i, len(tasks), task.name, task.workdir)
        state = train_lib.train(task.config, task.workdir)
        if state is not None and int(state.step) < task.config.num_train_steps:
            break  # it was asked to stop
        if all(t.config.sample_every for t in tasks[:i]):  # what the pages show is drawn on the way
            distributed.on_main(lambda i=i: write_pages(workdir, tasks[:i]))
    return tasks


def write_pages(workdir: Path, tasks: Sequence[Task]) -> None:
    """tasks.md and report.html of the tasks that are done."""
    found = matrix_lib.of_gauges({task.name: task.workdir for task in tasks})
    write_atomic(workdir / report.TASKS, matrix_lib.as_markdown(found))
    write_atomic(workdir / "report.html", report.tasks_page(workdir))


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory of the sequence.", required=True)
    distributed.define_flags()


def main() -> None:
    if FLAGS.config is None:
        raise ValueError("--config is needed, such as --config configs/mini_tasks.py")
    cli.check_kind(FLAGS.config, "configs/mini_tasks.py", "run_config", "carry", "tasks")
    cli.check_directory(FLAGS.workdir)
    distributed.initialize()
    workdir_lib.enable_compilation_cache()
    tasks = run(FLAGS.config, FLAGS.workdir)
    if not distributed.is_main():
        return
    for task in tasks:
        print(f"{task.name:20} {task.workdir}")
    if (Path(FLAGS.workdir) / "report.html").is_file():
        print(f"kept and learned     {FLAGS.workdir}/{report.TASKS}, {FLAGS.workdir}/report.html")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main, errors=(loop.TrainingError,))
