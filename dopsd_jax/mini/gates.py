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
from dopsd_jax.mini import drawing, encoding, judge, world
from dopsd_jax.mini import rows as rows_lib
from dopsd_jax.mini.emoji import Sprites, load_sprites
from dopsd_jax.mini.labels import Labels
from dopsd_jax.run import gauges, loras
from dopsd_jax.run import workdir as workdir_lib
from dopsd_jax.weights.pipeline import Pipeline, load_pipeline, load_vision_language
from dopsd_jax.weights.shipped import JUDGE, UNDISTILLED

FLAGS = flags.FLAGS
GUIDANCES = (1.0, 1.5, 2.5, 4.0)
MANY_STEPS = 48
SCANNED = 400                 # pictures per guidance scale, to choose the best one
FINE_TUNING = (50, 100, 200)  # updates of gate e
REFERENCES = 21               # stream of the random numbers of gate d's pictures
SAME_PLACE = 4.0              # pixels within which an object counts as put at the same place


class Meter:
    """Draws cases and has them judged."""

    def __init__(self, samples: int, judge_file: str | Path):
        self._judge = judge.read(str(judge_file))
        if "middles" not in self._judge.params:
            raise ValueError(
                f"{judge_file}: expected a judge that tells where things are; this one, of an "
                "earlier world, does not. configs/mini/judge.py trains one"
            )
        self.labels, self.report = self._judge.labels, self._judge.report
        self.cases = drawing.draw_cases(self.labels, samples)
        self._scanned = drawing.draw_cases(self.labels, min(samples, SCANNED), seed=1)

    def measure(self, pipe: Pipeline, params: trees.Tree, *, num_steps: int,
                guidance: float = 1.0, scan: bool = False) -> dict:
        """{frechet, style, concept, sharpness} of the pictures; of fewer, others for a `scan`."""
        cases = self._scanned if scan else self.cases
        ctx = drawing.text_contexts(pipe, cases.captions)
        pixels = drawing.draw(pipe, {"params": params}, ctx, cases.seeds,
                              num_steps=num_steps, guidance=guidance)
        return self.judged(pixels, "trained", cases)

    def middles(self, pixels: np.ndarray) -> np.ndarray:
        """Where the judge sees the only object of pictures: float32 [N, 2] in pixels."""
        return judge.opinion(self._judge.params, pixels).middles

    def judged(self, pixels: np.ndarray, real: str, cases: drawing.Cases) -> dict:
        """The judge's figures of pictures of `cases`, against the real pictures called `real`."""
        said = judge.opinion(self._judge.params, pixels)
        return {
            "frechet": judge.frechet_distance(judge.moments(said.features), self._judge.real[real]),
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


def references(
    sprites: Sprites, labels: Labels, style: str, count: int
) -> tuple[drawing.Cases, np.ndarray, np.ndarray]:
    """Pictures of a style as a user would show them, of things that the model knows.

    Returns:
        What is asked for beside each; the pictures, uint8 [N, 64, 64, 3]; and where the only object
        of each is, float32 [N, 2] in pixels, NaN where there are several.
    """
    scenes, pictures = [], []
    for i in range(count):
        rng = np.random.default_rng([REFERENCES, labels.styles.index(style), i])
        scene = world.draw_scene(rng, style=style, concepts=labels.trained_concepts, placed=0.0)
        scenes.append(scene)
        pictures.append(world.render(sprites, scene, rng))
    cases = drawing.Cases(
        [s.caption for s in scenes], np.full(count, labels.styles.index(style)),
        np.stack([labels.shown([t.concept for t in s.things]) for s in scenes]),
        np.arange(count) + 5_000_000,
    )
    middles = [(s.things[0].x, s.things[0].y) if len(s.things) == 1 else (np.nan,) * 2
               for s in scenes]
    return cases, np.stack(pictures), np.float32(middles)


def copied(drawn: np.ndarray, shown: np.ndarray) -> tuple[float, float]:
    """Share of pictures whose object is where the reference has it, and of random pairs of both.

    Args:
        drawn, shown: float32 [N, 2], middles in pixels; rows whose `shown` is NaN do not count.
    """
    counts = ~np.isnan(shown).any(1)
    drawn, shown = drawn[counts], shown[counts]
    off = np.linalg.norm(drawn[:, None] - shown[None], axis=-1) < SAME_PLACE
    count = len(off)
    own = np.diagonal(off).sum()
    return float(own / count), float((off.sum() - own) / (count * (count - 1)))


def teacher(meter: Meter, turbo: Pipeline, vl, num_steps: int, samples: int) -> dict:
    """Gate d: the distilled model shown pictures of held-out styles, by style."""
    result, sprites = {}, load_sprites()
    styles = meter.labels.held_out_styles
    for style in styles:
        cases, shown, middles = references(sprites, meter.labels, style, samples // len(styles))
        ctx = drawing.pair_contexts(turbo, vl, cases.captions, shown)
        pixels = drawing.draw(turbo, {"params": turbo.params}, ctx, cases.seeds,
                              num_steps=num_steps)
        result[style] = meter.judged(pixels, style, cases)
        own, chance = copied(meter.middles(pixels), middles)
        result[style] |= {"copied": own, "copied_by_chance": chance}
        log.info("teacher on %s: %s", style, result[style])
    return result


def fine_tuned(
    meter: Meter, turbo: Pipeline, data: str, num_steps: int, untuned: dict
) -> dict:
    """Gate e: plain flow matching on the training data, Adam 2e-4, 64 rows an update.

    `untuned` has the figures by number of steps, before any update.
    """
    scenes = jax.tree.map(jnp.asarray, rows_lib.scenes(data, turbo))
    optimizer = optax.adam(2e-4)
    params = turbo.params
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, opt_state, step):
        rows = rows_lib.draw(scenes, jax.random.fold_in(jax.random.key(77), step), 64)
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
        params, opt_state = update(params, opt_state, step)
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
    taught = results["teacher"].values()
    worst = {name: min(r[name] for r in taught) for name in ("style", "concept")}
    beyond = max(r["copied"] - r["copied_by_chance"] for r in taught)
    things = max(0.8, 0.9 * turbo["concept"])
    undone = [(ratio(s, num_steps), ratio(s, 24)) for s in FINE_TUNING]
    worse, beside = max(undone, key=lambda r: min(r[0] / 2, 1.3 / r[1]))
    return {
        "a": Verdict(lost >= 2 and lost_guided >= 1.5,
                     "there is something to lose: few plain steps / many, Frechet",
                     "2; 1.5 with guidance", f"{lost:.2f}; {lost_guided:.2f}"),
        "b": Verdict(kept <= 1.2 and twice <= 1.2,
                     "it is not lost: few steps / undistilled many at its best; twice as many",
                     "at most 1.2", f"{kept:.2f}; {twice:.2f}"),
        "c": Verdict(turbo["concept"] >= 0.93 and turbo["style"] >= 0.98,
                     "it draws what is asked: things; style", "0.93; 0.98",
                     f"{turbo['concept']:.2f}; {turbo['style']:.2f}"),
        "d": Verdict(worst["concept"] >= things and worst["style"] >= 0.95 and beyond <= 0.05,
                     "shown any new style, it draws in it, not the picture again: things; style; "
                     "place copied beyond chance", f"{things:.2f}; 0.95; at most 0.05",
                     f"{worst['concept']:.2f}; {worst['style']:.2f}; {beyond:.2f}"),
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
    places = "".join(
        f"| {name} | {r['copied']:.3f} | {r['copied_by_chance']:.3f} |\n"
        for name, r in results["teacher"].items()
    )
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
        "The same, with the object within 4 pixels of where the reference has it, and what random "
        "pairs of pictures have there:\n",
        f"| style | copied | by chance |\n|---|---|---|\n{places}",
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
        samples: Pictures per figure; of gate d of all styles together.
        num_steps: Deployed number of denoiser calls.
    """
    meter = Meter(samples, judge_file)
    turbo = load_pipeline(model, dtype="float32", remat="none")
    base = lora.merge(turbo.params, *loras.read_lora(undistilled, turbo))
    vl = load_vision_language(vlm, turbo, dtype="float32")
    results = {"samples": samples, "judge": meter.report}
    results["teacher"] = teacher(meter, turbo, vl, num_steps, samples)
    best, results["guidance"] = best_guidance(meter, turbo, base)
    results["best_guidance"] = best
    table = results["few_steps"] = few_steps(meter, turbo, base, num_steps, best)
    untuned = {s: table[f"turbo {s} steps"] for s in (num_steps, 2 * num_steps, 24)}
    results["fine_tuned"] = fine_tuned(meter, turbo, str(data), num_steps, untuned)
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
