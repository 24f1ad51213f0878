"""Command: is the mini model a fair test of the method? Measures what the model card says.

    python -m dopsd_jax.mini.build --out runs/mini/world
    python -m dopsd_jax.mini.gates --data runs/mini/world --out gates.json [--samples 2000]

Gates: a. few plain steps of the undistilled model are much worse than many; b. the distilled model
at its few steps is nearly as good as the undistilled one at many; c. it draws what it is asked for;
d. shown a picture of a style it never saw, it draws in that style; e. a few updates of plain
fine-tuning, on the very data it was trained on, take the few-step ability away and leave the
many-step one.

Prints the model card's tables; gates.json has every number.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from dopsd_jax.core import cli, trees
from dopsd_jax.core.log import log
from dopsd_jax.method import lora
from dopsd_jax.method.baselines import sft_loss_and_grad
from dopsd_jax.mini import data as data_lib
from dopsd_jax.mini import drawing, encoding, judge, world
from dopsd_jax.mini.base_stage import World
from dopsd_jax.mini.build import ALL_STYLES
from dopsd_jax.models.denoiser import Context
from dopsd_jax.run import gauges, loras
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.pipeline import Pipeline, load_pipeline, load_vision_language
from dopsd_jax.weights.shipped import JUDGE, UNDISTILLED

FLAGS = flags.FLAGS
GUIDANCES = (1.0, 1.5, 2.5, 4.0)
MANY_STEPS = 48
SCANNED = 400                 # pictures per guidance scale, to choose the best one
FINE_TUNING = (50, 100, 200)  # updates of gate e


class Meter:
    """Draws cases and has them judged."""

    def __init__(self, samples: int, judge_file: str | Path):
        self.cases = drawing.draw_cases(samples)
        self._scanned = drawing.draw_cases(min(samples, SCANNED), seed=1)
        self._judge, self._real, self.report = judge.read(str(judge_file))

    def measure(self, pipe: Pipeline, params: trees.Tree, *, num_steps: int,
                guidance: float = 1.0, scan: bool = False) -> dict:
        """{frechet, style, concept, sharpness} of the pictures; of fewer, others for a `scan`."""
        cases = self._scanned if scan else self.cases
        ctx = drawing.text_contexts(pipe, cases.captions)
        pixels = drawing.draw(pipe, {"params": params}, ctx, cases.seeds,
                              num_steps=num_steps, guidance=guidance)
        return self.judged(pixels, "trained", cases)

    def judged(self, pixels: np.ndarray, real: str, cases: drawing.Cases) -> dict:
        """The judge's figures of pictures of `cases`, against the real pictures called `real`."""
        said = judge.opinion(self._judge, pixels)
        return {
            "frechet": judge.frechet_distance(judge.moments(said.features), self._real[real]),
            "style": float(said.style_accuracy(cases.styles).mean()),
            "concept": float(said.concept_accuracy(cases.concepts).mean()),
            "sharpness": float(gauges.sharpness(pixels).mean()),
        }


def best_guidance(meter: Meter, pipe: Pipeline, base: trees.Tree) -> tuple[float, dict]:
    """The base's scale with the least Frechet distance at many steps, and the figures of each."""
    scan = {}
    for scale in GUIDANCES:
        scan[scale] = meter.measure(
            pipe, base, num_steps=MANY_STEPS, guidance=scale, scan=True
        )
        log.info("guidance %g: %s", scale, scan[scale])
    best = min(scan, key=lambda g: scan[g]["frechet"])
    return best, {f"x{scale:g}": figures for scale, figures in scan.items()}


def few_steps(
    meter: Meter, turbo: Pipeline, base: trees.Tree, num_steps: int, guidance: float
) -> dict:
    """Gates a, b and c: figures by (model, steps, guidance)."""
    table = {}
    for scale in dict.fromkeys((1.0, guidance)):
        for steps in (num_steps, 2 * num_steps, MANY_STEPS):
            key = f"base {steps} steps x{scale:g}"
            table[key] = meter.measure(turbo, base, num_steps=steps, guidance=scale)
            log.info("%s: %s", key, table[key])
    for steps in (num_steps, 2 * num_steps, 24):
        key = f"turbo {steps} steps"
        table[key] = meter.measure(turbo, turbo.params, num_steps=steps)
        log.info("%s: %s", key, table[key])
    return table


def teacher(meter: Meter, turbo: Pipeline, vl, test: data_lib.Part, num_steps: int,
            samples: int) -> dict:
    """Gate d: the distilled model shown pictures of held-out styles, by style."""
    result = {}
    features = jax.jit(lambda *a: encoding.pair_features(turbo, vl, *a))
    for style in world.HELD_OUT_STYLES:
        index = np.flatnonzero(test.styles == ALL_STYLES.index(style))[:samples]
        captions = [test.captions[i] for i in index]
        ids, mask = encoding.pair_ids(vl.tokenizer, captions)
        patches = encoding.patches(vl, test.pixels[index])
        parts = [
            features(turbo.text_params, vl.params, *(a[i : i + 100] for a in (ids, mask, patches)))
            for i in range(0, len(index), 100)
        ]
        ctx = Context(*(np.concatenate([np.asarray(getattr(p, n)) for p in parts])
                        for n in ("text", "text_mask")))
        cases = drawing.Cases(captions, test.styles[index], test.concepts[index],
                              np.arange(len(index)) + 5_000_000)
        pixels = drawing.draw(turbo, {"params": turbo.params}, ctx, cases.seeds,
                              num_steps=num_steps)
        result[style] = meter.judged(pixels, style, cases)
        log.info("teacher on %s: %s", style, result[style])
    return result


def fine_tuned(
    meter: Meter, turbo: Pipeline, vl, data: str, num_steps: int, untuned: dict
) -> dict:
    """Gate e: plain flow matching on the training data, Adam 2e-4, 64 rows an update.

    `untuned` has the figures by number of steps, before any update.
    """
    rows_of = World(data, turbo, vl)
    optimizer = optax.adam(2e-4)
    params = turbo.params
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, opt_state, rows):
        ctx = encoding.text_features(turbo, turbo.text_params, rows.ids, rows.mask)
        _, grads = sft_loss_and_grad(
            params, None, rows.noise, rows.latents, rows.sigma, ctx,
            velocity=turbo.denoiser.velocity, assemble=lambda _, params: {"params": params},
        )
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    table = {f"0 updates, {steps} steps": figures for steps, figures in untuned.items()}
    for step in range(max(FINE_TUNING) + 1):
        if step in FINE_TUNING:
            for steps in (num_steps, 2 * num_steps, 24):
                key = f"{step} updates, {steps} steps"
                table[key] = meter.measure(turbo, params, num_steps=steps)
                log.info("fine-tuned %s: %s", key, table[key])
        rows = rows_of.rows(np.random.default_rng([77, step]), 64, drop=0.0)
        params, opt_state = update(params, opt_state, jax.tree.map(jnp.asarray, rows))
    return table


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A gate: whether it holds, and the words and numbers for the model card."""

    holds: bool
    what: str
    asked: str
    found: str


def verdicts(results: dict, num_steps: int) -> dict[str, Verdict]:
    """The gates by letter."""
    table = results["few_steps"]

    def fd(key):
        return table[key]["frechet"]

    best = results["best_guidance"]
    many = fd(f"base {MANY_STEPS} steps x{best:g}")
    few, turbo = f"base {num_steps} steps", table[f"turbo {num_steps} steps"]
    twice = fd(f"turbo {2 * num_steps} steps") / many
    tuned = results["fine_tuned"]

    def ratio(step, steps):
        start = tuned[f"0 updates, {steps} steps"]["frechet"]
        return tuned[f"{step} updates, {steps} steps"]["frechet"] / start

    lost = fd(f"{few} x1") / fd(f"base {MANY_STEPS} steps x1")
    lost_guided = fd(f"{few} x{best:g}") / many
    kept = turbo["frechet"] / many
    taught = max(
        results["teacher"].values(), key=lambda r: min(r["style"] / 0.9, r["concept"] / 0.8)
    )
    undone = [(ratio(s, num_steps), ratio(s, 24)) for s in FINE_TUNING]
    worse, beside = max(undone, key=lambda r: min(r[0] / 2, 1.3 / r[1]))
    return {
        "a": Verdict(lost >= 2 and lost_guided >= 1.5,
                     "there is something to lose: few plain steps / many, Frechet",
                     "2; 1.5 with guidance", f"{lost:.2f}; {lost_guided:.2f}"),
        "b": Verdict(kept <= 1.3 and twice <= 1.3,
                     "it is not lost: few steps / undistilled many at its best; twice as many",
                     "at most 1.3", f"{kept:.2f}; {twice:.2f}"),
        "c": Verdict(turbo["concept"] >= 0.8 and turbo["style"] >= 0.9,
                     "it draws what is asked: things; style", "0.80; 0.90",
                     f"{turbo['concept']:.2f}; {turbo['style']:.2f}"),
        "d": Verdict(taught["style"] >= 0.9 and taught["concept"] >= 0.8,
                     "shown a new style, it draws in it: things; style", "0.80; 0.90",
                     f"{taught['concept']:.2f}; {taught['style']:.2f}"),
        "e": Verdict(worse >= 2 and beside <= 1.3,
                     "plain fine-tuning undoes few steps, not many: each / before",
                     "at least 2; at most 1.3", f"{worse:.2f}; {beside:.2f}"),
    }


def as_markdown(results: dict) -> str:
    """The tables of a model card: samplers, the teacher on new styles, fine-tuning, gates."""
    figures = ("frechet", "style", "concept", "sharpness")
    head = "| Frechet | style | things | sharpness |\n|---" + "|---" * len(figures) + "|\n"

    def rows(table: dict) -> str:
        return "".join(
            f"| {name} | {r['frechet']:.1f} | {r['style']:.3f} | {r['concept']:.3f} | "
            f"{r['sharpness']:.1f} |\n" for name, r in table.items()
        )

    scanned = {f"base {MANY_STEPS} steps {scale}": r for scale, r in results["guidance"].items()}
    gates = "".join(
        f"| {name}. {v['what']} | {v['asked']} | {v['found']} | "
        f"{'holds' if v['holds'] else '**missed**'} |\n" for name, v in results["gates"].items()
    )
    return "\n".join([
        f"{results['samples']} pictures per figure:\n",
        f"| sampler {head}{rows(results['few_steps'])}",
        f"To choose the guidance, {min(results['samples'], SCANNED)} pictures per figure:\n",
        f"| sampler {head}{rows(scanned)}",
        "Shown a picture of a style it never saw, and the caption:\n",
        f"| style {head}{rows(results['teacher'])}",
        "Plain fine-tuning on the training data:\n",
        f"| after {head}{rows(results['fine_tuned'])}",
        f"| gate | asked | found | |\n|---|---|---|---|\n{gates}",
    ])


def measure(
    *, model: str | Path = "mini", undistilled: str | Path = UNDISTILLED, vlm: str | Path = "mini",
    judge_file: str | Path = JUDGE, data: str | Path, samples: int = 2000, num_steps: int = 2,
) -> dict:
    """Everything that the gates ask for, and which of them hold (`gates`, by letter).

    Args:
        model, vlm: The distilled pipeline and its Qwen3-VL directory.
        undistilled: The LoRA that undoes its distillation.
        judge_file: From the judge's stage.
        data: The world, from dopsd_jax.mini.build.
        samples: Pictures per figure.
        num_steps: Deployed number of denoiser calls.
    """
    meter = Meter(samples, judge_file)
    test = data_lib.read_part(data, "judge_test")
    turbo = load_pipeline(model, dtype="float32", remat="none")
    base = lora.merge(turbo.params, *loras.read_lora(undistilled, turbo))
    vl = load_vision_language(vlm, turbo, dtype="float32")
    results = {"samples": samples, "judge": meter.report}
    results["teacher"] = teacher(meter, turbo, vl, test, num_steps, samples)
    best, results["guidance"] = best_guidance(meter, turbo, base)
    results["best_guidance"] = best
    table = results["few_steps"] = few_steps(meter, turbo, base, num_steps, best)
    untuned = {s: table[f"turbo {s} steps"] for s in (num_steps, 2 * num_steps, 24)}
    results["fine_tuned"] = fine_tuned(meter, turbo, vl, str(data), num_steps, untuned)
    results["gates"] = {k: dataclasses.asdict(v) for k, v in verdicts(results, num_steps).items()}
    return results


def main() -> None:
    workdir_lib.enable_compilation_cache()
    out = Path(FLAGS.out)
    cli.check_directory(out.parent)
    results = measure(
        model=FLAGS.model, undistilled=FLAGS.undistilled, vlm=FLAGS.vlm, judge_file=FLAGS.judge,
        data=FLAGS.data, samples=FLAGS.samples, num_steps=FLAGS.num_steps,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_atomic(out, json.dumps(results, indent=2) + "\n")
    print(as_markdown(results))


if __name__ == "__main__":
    flags.DEFINE_string("model", "mini", "The distilled pipeline.")
    flags.DEFINE_string("undistilled", str(UNDISTILLED), "The LoRA that undoes its distillation.")
    flags.DEFINE_string("vlm", "mini", "The Qwen3-VL directory.")
    flags.DEFINE_string("judge", str(JUDGE), "File of the judge's stage.")
    flags.DEFINE_string("data", "runs/mini/world", "From dopsd_jax.mini.build.")
    flags.DEFINE_string("out", "runs/mini/gates.json", "Where the figures go.")
    flags.DEFINE_integer("samples", 2000, "Pictures per figure.", lower_bound=100)
    flags.DEFINE_integer("num_steps", 2, "Deployed number of denoiser calls.", lower_bound=1)
    cli.run_command(main)
