"""Sequences of tasks by several methods, orders and seeds: how each is made, drawn and judged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dopsd_jax.compare.jobs import Job, at_once, run_all
from dopsd_jax.compare.measures import (
    FIRST_SEED,
    OLD,
    CaseSet,
    of_style,
    read_arrays,
    repeated,
    write_arrays,
)
from dopsd_jax.core import trees
from dopsd_jax.core.checks import is_number
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import counted, log
from dopsd_jax.data.keeping import read_prompts
from dopsd_jax.mini import drawing, judge, world
from dopsd_jax.mini.build import write_style
from dopsd_jax.mini.emoji import load_sprites
from dopsd_jax.models.denoiser import Context
from dopsd_jax.run import gauges, loras
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.pipeline import load_pipeline, load_vision_language
from dopsd_jax.weights.shipped import JUDGE, WIDE_JUDGE

CHOOSING = 0  # the seed of the trials that choose rates; the figures are of 1, 2, ..
# Of a method.
OPTIONS = ("changes", "carry", "keep_earlier", "replay_share", "rehearsal", "learning_rate")
FROM_JSON = "configs/tasks_from_json.py"
REAL = 22  # stream of the random numbers of the pictures that the teacher is shown
DRAWN_AT_ONCE = 10  # pictures; on a CPU a third faster than 100, which leave its cache
STYLE_NOISE = 100_000  # between the noises of two styles
Measured = dict[str, dict[str, np.ndarray]]  # name of a set -> style, concept, sharpness, drift


@dataclasses.dataclass(frozen=True)
class Trial:
    """A sequence of tasks by one method.

    Attributes:
        method, rate, order, seed: Which; `order` is one of the config's, counted from 0.
        styles: Of its tasks.
        workdir: Its directory.
        tasks: The sequence as dopsd_jax.tasks takes it.
    """

    method: str
    rate: float
    order: int
    seed: int
    styles: tuple[str, ...]
    workdir: Path
    tasks: dict[str, Any]

    def run(self, number: int) -> Path:
        """The run of a task, counted from 1."""
        return self.workdir / f"{number}_{self.styles[number - 1]}"

    @property
    def is_done(self) -> bool:
        last = self.run(len(self.styles))
        return self.tasks["changes"]["num_train_steps"] in workdir_lib.saved_steps(last)


class Trials:
    """All trials of a comparison, and the pictures of each, measured once and kept.

    What is drawn: things that no picture shows in every style, by the model after each task that
    has taught it or an earlier one; and old prompts, the first of them after every task, all after
    the last. All on the same noise.

    Args:
        config: See configs/mini_continual.py.
        workdir: Where everything goes.

    Raises:
        ValueError: Styles or methods that cannot be.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        check(config)
        self.config, self.workdir = config, workdir
        self.styles = tuple(dict.fromkeys(s for order in config.orders for s in order))
        file = config.judge or str(WIDE_JUDGE)
        self._judge, self._known = judge.read(file), judge.read(str(JUDGE)).labels
        self._judge_digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        self.report = self._judge.report
        self._check_judge()
        self._pipe = load_pipeline("mini", dtype="float32", remat="none")
        self._write_pictures()
        self.sets = self._case_sets()
        self._contexts = {
            name: drawing.text_contexts(self._pipe, s.rows.captions)
            for name, s in self.sets.items()
        }
        self._untuned = self.draw(OLD, {"params": self._pipe.params})
        self._taught: Measured = {}
        self.along = min(config.old_along, config.old_prompts)  # old prompts after every task

    def _check_judge(self) -> None:
        labels, known = self._judge.labels, self._known
        if unknown := sorted({*self.styles, *known.concepts} - {*labels.styles, *labels.concepts}):
            raise ValueError(f"judge: expected one that knows {', '.join(unknown)}, got one of "
                             f"{', '.join(labels.styles)}; configs/mini/judge.py trains another")

    def _case_sets(self) -> dict[str, CaseSet]:
        """What is drawn, by style, and old prompts; of what the shipped model knows."""
        c, labels, known = self.config, self._judge.labels, self._known
        old = drawing.draw_cases(
            labels, c.old_prompts, seed=7, styles=known.trained_styles,
            concepts=known.trained_concepts,
        )
        sets = {OLD: CaseSet(OLD, c.generation_seeds, repeated(old, c.generation_seeds,
                                                               FIRST_SEED))}
        for i, style in enumerate(self.styles):
            shown = {f.stem.replace("-", " ") for f in self.pictures(style).glob("*.png")}
            things = [t for t in known.trained_concepts if t not in shown][: c.style_things]
            cases = of_style(labels, style, things, self._called(style))
            rows = repeated(cases, c.generation_seeds, FIRST_SEED + (i + 1) * STYLE_NOISE)
            sets[style] = CaseSet(style, c.generation_seeds, rows)
        return sets

    def _called(self, style: str) -> str:
        """The word for a style in captions and prompts."""
        return self.config.called.get(style, style)

    def pictures(self, style: str) -> Path:
        """The folder of the pictures of a style that are learned from, named by its word too."""
        word = self._called(style)
        return self.workdir / "pictures" / (style if word == style else
                                            f"{style}_{_file_name(word)}")

    @property
    def _rehearsed(self) -> Path:
        """The folder of pictures that the untuned model drew of the prompts that are kept."""
        return self.workdir / "pictures" / "untuned"

    def _write_pictures(self) -> None:
        c = self.config
        for style in self.styles:
            folder = self.pictures(style)
            if not (folder / "ATTRIBUTION").is_file():
                write_style(load_sprites(), folder, style, c.pictures, seed=0,
                            concepts=self._known.trained_concepts, called=self._called(style))
            elif (found := len(list(folder.glob("*.png")))) != c.pictures:
                raise ValueError(f"pictures: {self.workdir} was begun with {found} of {style}, now "
                                 f"{c.pictures}; choose another --workdir")
        files = {m.get("changes", {}).get("keep_prompts", "") for m in c.methods.values()} - {""}
        if not any(m.get("rehearsal") for m in c.methods.values()) or self._rehearsed.is_dir():
            return
        prompts = read_prompts(files.pop())
        drawn = self._pictures({"params": self._pipe.params},
                               drawing.text_contexts(self._pipe, prompts), range(len(prompts)))
        partial = self._rehearsed.with_name(".untuned")
        partial.mkdir(parents=True, exist_ok=True)
        for i, (prompt, pixels) in enumerate(zip(prompts, drawn, strict=True)):
            Image.fromarray(pixels).save(partial / f"{i:04d}.png")
            (partial / f"{i:04d}.txt").write_text(prompt + "\n")
        partial.rename(self._rehearsed)

    def planned(
        self, rates: Mapping[str, Sequence[float]], seeds: Sequence[int]
    ) -> list[Trial]:
        """Trials of every method at its rates with every seed, the orders by turns."""
        return [
            self._trial(method, rate, seed)
            for method in rates for rate in rates[method] for seed in seeds
        ]

    def _trial(self, method: str, rate: float, seed: int) -> Trial:
        c, how = self.config, self.config.methods[method].to_dict()
        order = max(seed - 1, CHOOSING) % len(c.orders)
        styles = tuple(c.orders[order])
        changes = {
            "learning_rate": rate, "seed": seed + 30, "num_train_steps": c.num_train_steps,
            "checkpoint_every": c.num_train_steps, "sample_every": 0, "gauge_prompts": [],
            "log_every": c.num_train_steps, "preflight": "off",
            **how.get("changes", {}),
        }
        tasks = [{"name": style, "data": str(self.pictures(style))} for style in styles]
        if base := changes.pop("base_lora", ""):
            tasks[0]["base_lora"] = base  # the others follow
        if share := how.get("rehearsal", 0.0):
            for task in tasks:
                task["data"] += f",{self._rehearsed}"
            changes["data_weights"] = f"{1 - share:g},{share:g}"
        name = f"{_file_name(method)}-{rate:g}-{order}-{seed}"
        return Trial(method, rate, order, seed, styles, self.workdir / "trials" / name, {
            "run_config": c.run_config, "carry": how.get("carry", c.carry),
            "keep_earlier": how.get("keep_earlier", False),
            "replay_share": how.get("replay_share", c.replay_share),
            "changes": changes, "tasks": tasks,
        })

    def train(self, trials: Sequence[Trial]) -> None:
        """Trains what is not trained yet; a trial that was stopped continues.

        Raises:
            ValueError: A trial that was begun with other settings, or a command that ended with an
                error or too early.
        """
        jobs = []
        for trial in trials:
            file = self.workdir / "sequences" / f"{trial.workdir.name}.json"
            tasks = json.dumps(trial.tasks, indent=1)
            if trial.workdir.is_dir() and file.is_file() and file.read_text() != tasks:
                raise ValueError(f"{trial.workdir} was begun with other settings than the config's "
                                 f"now, see {file}; choose another --workdir")
            if trial.is_done:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, tasks)
            jobs.append(Job(
                ("dopsd_jax.tasks", "--config", f"{FROM_JSON}:{file}", "--workdir",
                 str(trial.workdir)),
                self.workdir / "logs" / f"{trial.workdir.name}.log",
            ))
        run_all(jobs, "sequences trained")
        if early := [str(t.workdir) for t in trials if not t.is_done]:
            raise ValueError(f"{', '.join(early)}: stopped before the end; give the same command "
                             "again")

    def measure(self, trials: Sequence[Trial]) -> None:
        """Measures the pictures after every task of trials that are trained.

        On a CPU several at a time: one such drawing leaves most cores idle.
        """
        todo = [(t, number) for t in trials for number in range(1, len(t.styles) + 1)]
        with ThreadPool(at_once(len(todo))) as pool:
            drawn = pool.imap_unordered(lambda one: self.measured(*one), todo)
            for _ in counted(drawn, len(todo), "tasks drawn"):
                pass

    def variables(self, trial: Trial | None, number: int) -> trees.Tree:
        """The weights after a task, counted from 1; of no trial the untuned model's.

        An adapter that the tasks were trained on top of (`base_lora`) is left out: what they
        learned is moved to the model itself.
        """
        if trial is None:
            return {"params": self._pipe.params}
        if trial.tasks["carry"] == "full":
            return {"params": workdir_lib.read_full(trial.run(number))}
        first = 1 if trial.tasks["carry"] == "stack" else number
        members = []
        for task in range(first, number + 1):
            tree, spec = workdir_lib.read_lora(trial.run(task))
            members.append(((tree, spec.scale), 1.0))
        return {"params": self._pipe.params, "lora": loras.take_loras(members, self._pipe)}

    def measured(self, trial: Trial | None, number: int = 0) -> Measured:
        """The pictures after a task: of its style and all earlier ones, and of old prompts.

        Of old prompts the first, or all after the last task.
        """
        names = (*self.styles, OLD) if trial is None else (*trial.styles[:number], OLD)
        picks = dict.fromkeys(names, slice(None))
        if trial is not None and number < len(trial.styles):
            picks[OLD] = slice(self.along * self.config.generation_seeds)
        key = [self._judge_digest, str(self.config.num_steps)]
        key += [text for n in names for text in self.sets[n].rows.captions[picks[n]]]
        if trial is not None:
            key += [(trial.run(number) / f).read_text() for f in ("config.json", "identity.json")]
        digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:8]
        label = "untuned" if trial is None else f"{trial.workdir.name}-{number}"
        file = self.workdir / "measured" / f"{label}-{digest}.npz"
        if not file.is_file():
            variables = self.variables(trial, number)
            found = {
                n: self._judged(n, self.draw(n, variables, picks[n]), picks[n]) for n in names
            }
            write_arrays(file, found)
            right = found[OLD]["style"] & found[OLD]["concept"]
            log.info("%s: old prompts %.3f", label, right.mean())
        return read_arrays(file)

    def draw(self, name: str, variables: trees.Tree, pick: slice = slice(None)) -> np.ndarray:
        """Pictures of a set, or some of them, uint8 [N, 64, 64, 3]."""
        ctx = jax.tree.map(lambda x: x[pick], self._contexts[name])
        return self._pictures(variables, ctx, self.sets[name].rows.seeds[pick])

    def _pictures(self, variables: trees.Tree, ctx: Context, seeds: Sequence[int]) -> np.ndarray:
        return drawing.draw(
            self._pipe, variables, ctx, seeds, num_steps=self.config.num_steps,
            batch=min(DRAWN_AT_ONCE, len(seeds)),
        )

    def taught(self) -> Measured:
        """What the teacher draws of every style: the untuned model, shown a real picture of each
        thing that is asked for."""
        if self._taught:
            return self._taught
        vl, sprites = load_vision_language("mini", self._pipe, dtype="float32"), load_sprites()
        labels, found = self._judge.labels, {}
        for style in self.styles:
            rows, shown = self.sets[style].rows, []
            for i, things in enumerate(rows.concepts):
                rng = np.random.default_rng([REAL, labels.styles.index(style), i])
                (thing,) = np.asarray(labels.concepts)[things]
                shown.append(world.render(sprites, world.plain_scene(rng, style, str(thing)), rng))
            ctx = drawing.pair_contexts(self._pipe, vl, rows.captions, np.stack(shown))
            pixels = self._pictures({"params": self._pipe.params}, ctx, rows.seeds)
            found[style] = self._judged(style, pixels, slice(None))
        self._taught = found
        return found

    def by_case(self, name: str, values: np.ndarray) -> np.ndarray:
        """Of all or the first pictures of a set, [pictures] -> [prompts, noises]."""
        return np.asarray(values).reshape(-1, self.sets[name].seeds)

    def _judged(self, name: str, pixels: np.ndarray, pick: slice) -> dict[str, np.ndarray]:
        """Of the pictures of some of a set's rows: bool style and concept, float32 sharpness and,
        of old prompts, drift, all [N].

        Drift is the root mean square of the difference to the untuned model's picture on the same
        noise, in levels of 255.
        """
        rows, said = self.sets[name].rows, judge.opinion(self._judge.params, pixels)
        found = {
            "style": said.style_accuracy(rows.styles[pick]),
            "concept": said.concept_accuracy(rows.concepts[pick]),
            "sharpness": np.asarray(gauges.sharpness(pixels), np.float32),
        }
        if name == OLD:
            off = pixels.astype(np.float32) - self._untuned[pick]
            found["drift"] = np.sqrt(np.mean(np.square(off), (1, 2, 3)))
        return found


def _file_name(text: str) -> str:
    """Part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", text)


def _of_a_sequence(where: str, how: Mapping[str, Any]) -> list[str]:
    """What is wrong with how sequences go on, as a config or one of its methods says it."""
    problems = []
    for key in ("rehearsal", "replay_share"):
        share = how.get(key, 0.0)
        if not is_number(share) or not 0 <= share < 1:
            problems.append(f"{where}{key}: expected a share in [0, 1), got {share!r}")
    if (carry := how.get("carry", "adapter")) not in loras.CARRIES:
        problems.append(f"{where}carry: expected one of {tuple(loras.CARRIES)}, got {carry!r}")
    return problems


def check(config: ConfigDict) -> None:
    """Raises ValueError for everything in the comparison itself that cannot be, together."""
    problems = []
    orders = [tuple(order) for order in config.orders]
    if not orders or any(sorted(o) != sorted(orders[0]) or len(set(o)) < len(o) for o in orders):
        problems.append(f"orders: expected the same styles in each, every one once, got {orders}")
    called = [config.called.get(s, s) for s in dict.fromkeys(s for o in orders for s in o)]
    if not all(isinstance(word, str) and word for word in called) or len({*called}) < len(called):
        problems.append(f"called: expected another word for every style, got {called}")
    if unknown := sorted({s for order in orders for s in order} - {*world.STYLES}):
        problems.append(f"orders: expected styles of {', '.join(world.STYLES)}, got "
                        f"{', '.join(map(repr, unknown))}")
    for rate in config.learning_rates:
        if not is_number(rate) or rate <= 0:
            problems.append(f"learning_rates: expected numbers above 0, got {rate!r}")
    problems += _of_a_sequence("", config)
    if len(config.methods) < 1:
        problems.append("methods: expected at least one, got none")
    files = set()
    for name, how in config.methods.items():
        if unknown := sorted(set(how) - set(OPTIONS)):
            problems.append(f"methods.{name}: expected {', '.join(OPTIONS)}, got "
                            f"{', '.join(unknown)}")
        rate = how.get("learning_rate", 1.0)
        if not is_number(rate) or rate <= 0:
            problems.append(f"methods.{name}.learning_rate: expected a number above 0, got "
                            f"{rate!r}")
        problems += _of_a_sequence(f"methods.{name}.", how)
        files |= {how.get("changes", {}).get("keep_prompts", "")} - {""}
    if len(files) > 1 or (not files and any(m.get("rehearsal") for m in config.methods.values())):
        problems.append("methods: expected one file of keep_prompts, whose pictures are rehearsed "
                        f"too, got {sorted(files) or 'none'}")
    counts = ("pictures", "num_train_steps", "training_seeds", "num_steps", "old_prompts",
              "old_along", "style_things", "generation_seeds")
    for name in counts:
        least = 2 if name in ("training_seeds", "old_prompts", "style_things") else 1
        if not isinstance(config[name], int) or config[name] < least:
            problems.append(f"{name}: expected a whole number from {least} on, got "
                            f"{config[name]!r}")
    if problems:
        raise ValueError("config:\n  " + "\n  ".join(problems))
