"""Command: a tuned model beside its base, on the same prompts and noise, with intervals.

    python -m dopsd_jax.paired --model DIR --lora runs/a --prompts prompts.txt --seeds 3 \\
        --num_steps 8 --workdir runs/a/paired --clip CLIP --pickscore PICKSCORE

Draws every prompt with every seed, once without and once with what was tuned, and measures both
by every metric whose weights are given. 300 prompts and 3 seeds are the 900 pairs of the papers.
The same command again continues; prompts and seeds may be added at the end.

Writes <workdir>/base and tuned, table.md, scores.json, pairs.csv and changed.png.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dopsd_jax import sample
from dopsd_jax.compare import metric_weights, paired
from dopsd_jax.compare.metric_weights import METRICS
from dopsd_jax.compare.paired import SHARPNESS, Measured
from dopsd_jax.compare.scores import Request, check_torch, measure
from dopsd_jax.core import cli
from dopsd_jax.core.checks import noted
from dopsd_jax.core.files import write_atomic
from dopsd_jax.core.log import counted, log
from dopsd_jax.data.images import read_image
from dopsd_jax.data.keeping import read_prompts
from dopsd_jax.method.sampling import draw_noise
from dopsd_jax.run import gauges, loras, previews
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.fingerprints import fingerprint
from dopsd_jax.weights.pipeline import DTYPES, Pipeline, load_pipeline
from dopsd_jax.weights.shipped import pipeline_directory

FLAGS = flags.FLAGS
HISTORY = "paired.json"
BASE, TUNED = "base", "tuned"
SHOWN = 10  # pairs on the contact sheet
GROWING = ("prompts", "seeds")  # of the history; what they begin with may not change


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is drawn.

    Attributes:
        workdir: Of everything.
        models: Side, BASE or TUNED -> pipeline directory or name.
        lora: What the tuned side adds, as `loras.parse` reads it.
        prompts, seeds: Every prompt is drawn with every seed.
        num_steps, height, width, dtype: As `sample` takes them.
    """

    workdir: Path
    models: Mapping[str, str]
    lora: Sequence[str]
    prompts: Sequence[str]
    seeds: Sequence[int]
    num_steps: int
    height: int
    width: int
    dtype: str

    def rows(self) -> list[tuple[int, int]]:
        """(number of the prompt, seed) of every pair; the seeds of a prompt stand together."""
        return [(i, seed) for i in range(len(self.prompts)) for seed in self.seeds]

    def file(self, side: str, row: tuple[int, int]) -> Path:
        return self.workdir / side / f"{row[0]:04d}_{row[1]}.png"

    def files(self, side: str) -> list[Path]:
        return [self.file(side, row) for row in self.rows()]

    def by_prompt(self, values: np.ndarray) -> np.ndarray:
        """[pairs] -> float64 [prompts, seeds]."""
        return np.asarray(values, np.float64).reshape(len(self.prompts), len(self.seeds))


def planned(
    workdir: Path, model: str, tuned_model: str | None, lora: Sequence[str], prompts: str, *,
    first_seed: int, seeds: int, num_steps: int, height: int | None, width: int | None,
    dtype: str,
) -> Plan:
    """Everything that can be wrong is found here, before weights are read.

    Raises:
        ValueError: Everything that is wrong, together.
    """
    problems: list[str] = []
    texts: Sequence[str] = ()
    if not lora and tuned_model is None:
        problems.append("expected what was tuned: --lora, or --tuned_model of full fine-tuning")
    if seeds < 1:
        problems.append(f"seeds: expected at least 1 for each prompt, got {seeds}")
    with noted(problems):
        texts = read_prompts(prompts, "prompts")
    models = {BASE: model, TUNED: model if tuned_model is None else tuned_model}
    sides = height, width
    for name in dict.fromkeys(models.values()):
        with noted(problems):
            pipe = load_pipeline(name, dtype=dtype, parts=())
            if name == models[TUNED]:
                with noted(problems):
                    _take(lora, pipe)
            sides = sample.picture_size(pipe, *sides, [])
            if texts:
                sample.check_request(
                    pipe, texts, num_steps=num_steps, height=sides[0], width=sides[1],
                    seed=first_seed + max(seeds, 1) - 1,
                )
    if problems:
        raise ValueError("\n  ".join(problems))
    return Plan(workdir, models, lora, texts, range(first_seed, first_seed + seeds), num_steps,
                *sides, dtype)


def _take(lora: Sequence[str], pipe: Pipeline):
    """The LoRAs of a command line as `sample.generate` takes them, or None."""
    return (loras.take_loras([loras.parse(text) for text in lora], pipe), 1.0) if lora else None


def claim(plan: Plan) -> None:
    """Takes the workdir, or checks it against what was drawn there.

    Raises:
        ValueError: Other models, LoRAs, settings, prompts or seeds than those that were drawn with;
            or a directory that holds other things.
    """
    history = {
        "models": {side: fingerprint(pipeline_directory(m)) for side, m in plan.models.items()},
        "lora": [loras.fingerprint(text) for text in plan.lora],
        "num_steps": plan.num_steps, "height": plan.height, "width": plan.width,
        "dtype": plan.dtype, "prompts": list(plan.prompts), "seeds": list(plan.seeds),
    }
    file = plan.workdir / HISTORY
    if file.is_file():
        old = _read(file, history, "restore it, or choose another --workdir")
        changed = [
            _difference(key, old[key], new) for key, new in history.items()
            if (new[: len(old[key])] if key in GROWING else new) != old[key]
        ]
        if changed:
            raise ValueError(f"{plan.workdir}: was drawn otherwise; choose another --workdir, or "
                             "as it was:\n  " + "\n  ".join(changed))
    elif plan.workdir.is_dir() and any(p.name[0] != "." for p in plan.workdir.iterdir()):
        raise ValueError(f"{plan.workdir}: holds other things; choose a new --workdir")
    plan.workdir.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(history, indent=1, ensure_ascii=False) + "\n")


def _difference(key: str, old: Any, new: Any) -> str:
    """In words, how a value of the history changed."""
    if key not in GROWING:
        return f"{key}: was {old}, now {new}"
    k = next(k for k, value in enumerate(old) if new[k : k + 1] != [value])
    now = repr(new[k]) if k < len(new) else "none"
    return (f"{key}: {len(old)} were drawn, to which others may only be added; number {k + 1} was "
            f"{old[k]!r}, now {now}")


def _read(file: Path, like: Mapping[str, Any], advice: str) -> dict[str, Any]:
    """A JSON object with the keys and kinds of values of another.

    Raises:
        ValueError: Not one, with the advice.
    """
    try:
        values = json.loads(file.read_text())
        good = all(type(values[key]) is type(value) for key, value in like.items())
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{file}: damaged; {advice}")
    return values


def draw(plan: Plan, batch: int) -> None:
    """Draws what is not there yet, side by side with the same batches and noise."""
    pipe, opened = None, None
    for side, model in plan.models.items():
        rows = plan.rows()
        missing = [
            part for part in (rows[i : i + batch] for i in range(0, len(rows), batch))
            if not all(plan.file(side, row).is_file() for row in part)
        ]
        if not missing:
            continue
        log.info("%s: %d pictures to draw", side, sum(map(len, missing)))
        if opened != model:
            pipe, opened = None, model  # the other model's memory is free before this one is read
            pipe = load_pipeline(model, dtype=plan.dtype)
        lora = _take(plan.lora, pipe) if side == TUNED else None
        (plan.workdir / side).mkdir(exist_ok=True)
        for part in counted(missing, batch * len(missing), "pictures", each=batch):
            _draw_batch(plan, side, pipe, lora, part, batch)


def _draw_batch(plan: Plan, side: str, pipe: Pipeline, lora, rows, batch: int) -> None:
    """Draws and writes some rows; the picture of a row appears when all of it is there."""
    full = [*rows, *[rows[-1]] * (batch - len(rows))]  # one shape, compiled once
    noise = draw_noise(
        [seed for _, seed in full], pipe.denoiser.latent_shape(plan.height, plan.width)
    )
    pixels = sample.generate(
        pipe, [plan.prompts[i] for i, _ in full], num_steps=plan.num_steps, height=plan.height,
        width=plan.width, noise=noise, lora=lora,
    )
    for row, image in zip(rows, pixels, strict=False):
        made = {"prompt": plan.prompts[row[0]], "seed": row[1], "num_steps": plan.num_steps,
                "model": plan.models[side], "lora": list(plan.lora) if side == TUNED else []}
        path = plan.file(side, row)
        write_atomic(path.with_suffix(".json"), json.dumps(made, indent=2, ensure_ascii=False))
        previews.save(path, image)


def score(
    plan: Plan, metrics: Sequence[str], weights: Mapping[str, Path], device: str
) -> dict[str, Measured]:
    """Metric -> both sides' figures; those of one network are kept in <workdir>/scores.

    Raises:
        ValueError: As `measure`.
    """
    (plan.workdir / "scores").mkdir(exist_ok=True)
    drawn = {"prompts": list(plan.prompts), "seeds": list(plan.seeds)}
    found = _kept(plan, SHARPNESS, drawn, lambda: {SHARPNESS: Measured(*(
        plan.by_prompt(_sharpness(plan.files(side))) for side in (BASE, TUNED)
    ))})
    for kind, place in weights.items():
        wanted = [m for m in metrics if METRICS[m].weights == kind]
        of = drawn | {"weights": fingerprint(place), "metrics": wanted}
        found |= _kept(
            plan, kind, of,
            lambda wanted=wanted, kind=kind: _measured(plan, wanted, {kind: weights[kind]}, device),
        )
    return found


def _sharpness(files: Sequence[Path]) -> np.ndarray:
    return np.concatenate([
        gauges.sharpness(np.asarray(read_image(file))[None])
        for file in counted(files, len(files), "pictures")
    ])


def _kept(plan: Plan, name: str, of: Mapping[str, Any], made) -> dict[str, Measured]:
    """Figures from <workdir>/scores/NAME.json if they are of the same; else made, and kept."""
    file = plan.workdir / "scores" / f"{name}.json"
    if file.is_file():
        old = _read(file, {"of": {}, "values": {}}, "delete it, and it is measured again")
        if old["of"] == of:
            return {metric: Measured(*(None if x is None else plan.by_prompt(x) for x in sides))
                    for metric, sides in old["values"].items()}
    found = made()
    values = {metric: [None if x is None else x.tolist() for x in (m.base, m.tuned)]
              for metric, m in found.items()}
    write_atomic(file, json.dumps({"of": of, "values": values}) + "\n")
    return found


def _measured(
    plan: Plan, metrics: Sequence[str], weights: Mapping[str, Path], device: str
) -> dict[str, Measured]:
    """The metrics of one network: base and tuned against the prompts, tuned against base."""
    prompts = [plan.prompts[i] for i, _ in plan.rows()]
    count, base, tuned = len(prompts), plan.files(BASE), plan.files(TUNED)
    # Against references, a base picture would only be compared with itself.
    pictures = [*base, *tuned] if any(METRICS[m].against == "prompt" for m in metrics) else tuned
    numbers = range(len(pictures))
    request = Request(
        pictures, [prompts[i % count] for i in numbers], base, [[i % count] for i in numbers],
        "name",
    )
    found = {}
    for name, s in measure(request, metrics, weights, device=device).items():
        of_prompt = METRICS[name].against == "prompt"
        found[name] = Measured(plan.by_prompt(s.values[:count]) if of_prompt else None,
                               plan.by_prompt(s.values[-count:]))
    return found


def write_results(plan: Plan, measured: Mapping[str, Measured]) -> str:
    """table.md, scores.json, pairs.csv and changed.png; returns the table."""
    count = f"{len(plan.prompts)} prompts, {len(plan.seeds)} seeds each"
    pairs = len(plan.rows())
    summaries = paired.summaries(measured)
    text = (
        f"{count}: {pairs} pairs of pictures from the same noise, {plan.width} x {plan.height}, "
        f"{plan.num_steps} denoiser calls. In brackets the 95% interval over prompts.\n\n"
        f"{paired.as_tables(summaries)}"
    )
    write_atomic(plan.workdir / "table.md", text)
    write_atomic(plan.workdir / "scores.json", json.dumps({
        "prompts": len(plan.prompts), "seeds": list(plan.seeds), "pairs": pairs,
        "num_steps": plan.num_steps, "metrics": summaries,
    }, indent=2) + "\n")
    paired.write_csv(plan.workdir / "pairs.csv", measured, plan.prompts, plan.seeds)
    order = np.argsort(-paired.moved(measured).ravel(), kind="stable")[:SHOWN]
    rows, sides = plan.rows(), [plan.files(side) for side in (BASE, TUNED)]
    shown = [
        (*(files[k] for files in sides), plan.prompts[rows[k][0]],
         [f"seed {rows[k][1]}", *paired.figures(measured, *divmod(int(k), len(plan.seeds)))])
        for k in order
    ]
    previews.save(plan.workdir / "changed.png", paired.contact_sheet(shown))
    return text


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    flags.DEFINE_string("model", None, "Pipeline directory, name on the hub, or mini.",
                        required=True)
    flags.DEFINE_multi_string("lora", [], "What was tuned: workdir of a run, LoRA file, or PEFT "
                              "directory, with :STRENGTH behind it if not 1; several add up.")
    flags.DEFINE_string("tuned_model", None, "Of full fine-tuning: the exported pipeline.")
    flags.DEFINE_string("prompts", None, "Text file with a prompt in each line; one that stands "
                        "twice counts once.", required=True)
    flags.DEFINE_integer("seeds", 3, "How many pictures of each prompt.")
    flags.DEFINE_integer("seed", 0, "The first seed; every prompt takes the same ones.",
                         lower_bound=0)
    flags.DEFINE_integer("num_steps", 8, "Number of denoiser calls.")
    flags.DEFINE_integer("height", None, "Pixels; default: the model's own.")
    flags.DEFINE_integer("width", None, "Pixels; default: the model's own.")
    flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Dtype of transformer and text encoder.")
    flags.DEFINE_integer("batch", 4, "Pictures drawn at once.", lower_bound=1)
    flags.DEFINE_string("workdir", None, "Directory of everything.", required=True)
    metric_weights.define_flags()


def main() -> None:
    if FLAGS.device == "cuda":  # torch needs some of it too
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    workdir = Path(FLAGS.workdir)
    cli.check_directory(workdir)
    workdir_lib.enable_compilation_cache()
    metrics, places = [], {}
    weights = metric_weights.given_weights()
    if FLAGS.metrics is not None or any(weights.values()):
        metrics = metric_weights.chosen_metrics(FLAGS.metrics, weights, references=True)
        places = metric_weights.check_weights(metrics, weights)
        check_torch(FLAGS.device)
    plan = planned(
        workdir, FLAGS.model, FLAGS.tuned_model, FLAGS.lora, FLAGS.prompts, first_seed=FLAGS.seed,
        seeds=FLAGS.seeds, num_steps=FLAGS.num_steps, height=FLAGS.height, width=FLAGS.width,
        dtype=FLAGS.dtype,
    )
    log.info("%s: %d prompts, %d seeds each: %d pairs", FLAGS.prompts, len(plan.prompts),
             len(plan.seeds), len(plan.rows()))
    claim(plan)
    draw(plan, FLAGS.batch)
    text = write_results(plan, score(plan, metrics, places, FLAGS.device))
    print(text)
    print(f"{workdir}/table.md, scores.json, pairs.csv, changed.png; pictures in "
          f"{workdir}/{BASE} and {TUNED}")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)
