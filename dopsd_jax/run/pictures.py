"""Pictures of a run: the preflight's before it, previews and their gauges along the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dopsd_jax.core import distributed, sharding, trees
from dopsd_jax.core.log import log
from dopsd_jax.core.metrics import Metrics
from dopsd_jax.data.batches import BatchRows
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.data.datasets import Data
from dopsd_jax.data.images import to_uint8
from dopsd_jax.method import dora, flow, lora, sampling
from dopsd_jax.method.guidance import advise, scale_of, with_guidance
from dopsd_jax.method.train_step import Method, TrainState
from dopsd_jax.models.denoiser import Context
from dopsd_jax.run import gauges, preflight, previews
from dopsd_jax.run.features import BatchFeatures
from dopsd_jax.weights.pipeline import Pipeline

PREFLIGHT_PICTURES = 8
AT_ONCE = 4  # pictures that are drawn together where rows are not split over devices


def at_once(mesh: Mesh) -> int:
    """How many pictures a run draws together, which bounds the memory that they need."""
    return AT_ONCE * mesh.shape["data"] * mesh.shape["fsdp"]


def have_pictures(data: Data, rows: BatchRows) -> bool:
    """Whether every one of the rows has a target."""
    return all(data.rows[i].target for i in rows.rows)


class Artist:
    """Draws on one schedule: (variables, noise, ctx) -> pictures, and x0 of row 0."""

    def __init__(self, pipe: Pipeline, mesh: Mesh, bucket: Bucket, num_steps: int, shift: float,
                 guidance: tuple[Context, float] | None = None):
        """`shift` 0 is the sampler's own; `guidance`: a negative text and the scale, if any."""
        self._pipe, self._everywhere = pipe, sharding.replicated(mesh)
        shift = shift or pipe.shift_at(num_steps, bucket.height, bucket.width)
        self._sigmas, self._guidance = flow.sigmas_shifted(num_steps, shift), guidance
        self._at_once = at_once(mesh)

    def __call__(self, variables, noise, ctx) -> tuple[np.ndarray, np.ndarray]:
        def part(first: int):
            return jax.tree.map(lambda x: x[first:first + self._at_once], (noise, ctx))

        starts = range(0, len(noise), self._at_once)
        parts = [self._draw(variables, *part(first)) for first in starts]
        x = np.concatenate([x for x, _ in parts])
        return sampling.decode(self._pipe, jnp.asarray(x)), parts[0][1][:, 0]

    def _draw(self, variables, noise, ctx) -> tuple[np.ndarray, np.ndarray]:
        if self._guidance:
            ctx = with_guidance(ctx, *self._guidance)
        noise, ctx, sigmas = sharding.place((noise, ctx, self._sigmas), self._everywhere)
        return sharding.fetch(
            sampling.sample_trajectory(self._pipe.denoiser, variables, noise, ctx, sigmas)
        )


def own_artist(config, pipe: Pipeline, mesh: Mesh, bucket: Bucket, ctxs: BatchFeatures) -> Artist:
    """Draws in the preview steps of a run's own model, and with its guidance if there is any."""
    if not config.base_lora:  # which may undo a distillation
        advise(pipe, config.sample_guidance)
    guidance = None
    if config.sample_guidance:
        negative = ctxs.prompts([config.sample_negative])
        guidance = negative, scale_of(pipe, config.sample_guidance)
    return Artist(pipe, mesh, bucket, config.sample_steps, config.shift, guidance)


def run_preflight(config, workdir: Path, pipe: Pipeline, data: Data, ctxs: BatchFeatures,
                  of_student: trees.Tree, of_teacher: trees.Tree, mesh: Mesh) -> None:
    """Compares untrained student and teacher; writes preflight.json and its pictures."""
    rows = data.first_rows(PREFLIGHT_PICTURES, repeat=True)
    if not have_pictures(data, rows):
        log.info("preflight: left out; rows without pictures leave it nothing to compare with")
        return
    targets = to_uint8(np.stack([data.pixels(i) for i in rows.rows]))
    student_ctx, teacher_ctx, _ = ctxs.batch(rows)
    shape = pipe.denoiser.latent_shape(rows.bucket.height, rows.bucket.width)
    noise = sampling.draw_noise([config.seed + 3000 + i for i in range(len(rows.rows))], shape)
    draw = own_artist(config, pipe, mesh, rows.bucket, ctxs)
    student, teacher = (draw(variables, noise, ctx)[0] for variables, ctx in (
        (of_student, student_ctx), (of_teacher, teacher_ctx)))
    found = preflight.compare(student, teacher, targets)
    for words in found.words():
        (log.info if found.teaches else log.warning)("preflight: %s", words)
    if distributed.is_main():
        previews.save(workdir / "samples" / "preflight.png", previews.grid(
            [("target", targets), ("student", student), ("teacher", teacher)]
        ))
        preflight.write(workdir, found)


class EarlierRows:
    """Some prompts of an earlier task, drawn again in every preview."""

    def __init__(self, config, pipe: Pipeline, data: Data, ctxs: BatchFeatures,
                 untuned: trees.Tree, mesh: Mesh):
        rows = data.first_rows(config.sample_rows)
        self._targets = None
        if have_pictures(data, rows):
            self._targets = to_uint8(np.stack([data.pixels(i) for i in rows.rows]))
        self._ctx = ctxs.prompts(data.captions(rows))
        shape = pipe.denoiser.latent_shape(rows.bucket.height, rows.bucket.width)
        self._noise = sampling.draw_noise([config.seed + i for i in range(len(rows.rows))], shape)
        self._draw = own_artist(config, pipe, mesh, rows.bucket, ctxs)
        self._base, _ = self._draw(untuned, self._noise, self._ctx)

    def drawn(self, student: trees.Tree) -> tuple[list[tuple[str, np.ndarray]], float | None]:
        """Columns of a grid, and the distance in style to that task's targets if it has any."""
        ours, _ = self._draw(student, self._noise, self._ctx)
        columns = [("base", self._base), ("student", ours)]
        if self._targets is None:
            return columns, None
        style = gauges.style_distance(ours, self._targets).mean()
        return [("target", self._targets), *columns], style


Subjects = dict[str, tuple[jax.Array, Context]]  # what is drawn: name -> noise, ctx


class Moved:
    """What trains, on another model: that model without it and with it, on the same noise."""

    def __init__(self, config, pipe: Pipeline, mesh: Mesh, bucket: Bucket, method: Method,
                 subjects: Subjects, student: trees.Tree):
        """Draws the model as it is; `pipe`: see `preview_model.load`; `student`: of any step."""
        self._method, self._base, self._subjects = method, {"params": pipe.params}, subjects
        if paths := dora.paths(student):
            norms = jax.jit(lambda params: dora.column_norms(params, paths))
            self._base["norms"] = norms(pipe.params)
        self._draw = Artist(
            pipe, mesh, bucket, config.preview_model_steps, config.preview_model_shift
        )
        variables = method.assemble(self._base, student)
        variables |= {"lora": lora.weakened(variables["lora"], 0.0)}
        self.untuned = {name: self._draw(variables, *s)[0] for name, s in subjects.items()}

    def drawn(self, student: trees.Tree) -> dict[str, np.ndarray]:
        """Pictures of every subject."""
        variables = self._method.assemble(self._base, student)
        return {name: self._draw(variables, *s)[0] for name, s in self._subjects.items()}


class Previews:
    """Grids of base, student and any teacher, and their trajectories, of one bucket's rows."""

    def __init__(self, config, workdir: Path, pipe: Pipeline, data: Data, ctxs: BatchFeatures,
                 method: Method, base: trees.Tree, untuned: trees.Tree, mesh: Mesh,
                 moved: tuple[Pipeline, trees.Tree] | None = None):
        """Draws what never changes.

        Args:
            untuned: Variables of the model without any LoRA; drawn now, and not stored.
            moved: The preview_model and a student, if previews are drawn on another model too.
        """
        self._workdir, self._pipe, self._method, self._base = workdir, pipe, method, base
        rows = data.first_rows(config.sample_rows)
        self._draw = own_artist(config, pipe, mesh, rows.bucket, ctxs)
        self._targets, self._references = None, []
        if have_pictures(data, rows):
            *self._references, self._targets = (
                to_uint8(np.stack([data.pixels(i, image) for i in rows.rows]))
                for image in range(rows.bucket.references + 1)
            )
        student_ctx, self._teacher_ctx, _ = ctxs.batch(rows)
        shape = pipe.denoiser.latent_shape(rows.bucket.height, rows.bucket.width)

        def noise(first: int, count: int) -> jax.Array:
            return sampling.draw_noise([config.seed + first + i for i in range(count)], shape)

        self._subjects = {"step": (noise(0, len(rows.rows)), student_ctx)}
        for name, prompts, first in (("prompts", config.sample_prompts, 1000),
                                     ("gauge", config.gauge_prompts, 2000)):
            if prompts:
                self._subjects[name] = noise(first, len(prompts)), ctxs.prompts(prompts)
        # Now, because full fine-tuning may keep no base and a resumed run's student has moved.
        self._untuned = {name: self._draw(untuned, *s)[0] for name, s in self._subjects.items()}
        self._target_name = "target"
        if self._targets is None:  # then what the untuned teacher draws is what to become
            self._target_name = "untuned teacher"
            self._targets, _ = self._draw(untuned, self._subjects["step"][0], self._teacher_ctx)
        self._earlier = [
            EarlierRows(config, pipe, earlier, ctxs, untuned, mesh) for earlier in data.earlier
        ]
        self._moved = None
        if moved:
            other, student = moved
            self._moved = Moved(config, other, mesh, rows.bucket, method, self._subjects, student)

    def save(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Writes step_N, trajectory_N, prompts_N and gauge_N.png in samples/, and the gauges; with
        a preview_model also preview_step_N, preview_prompts_N and preview_gauge_N.png."""
        student = self._method.assemble(self._base, state.student)
        drawn, trajectories = {}, []
        for name, subject in self._subjects.items():
            drawn[name], trajectory = self._draw(student, *subject)
            trajectories = trajectories or [trajectory]
        values, beside = self._values(drawn, self._untuned), []
        if self._teacher_ctx is not None:
            teacher = self._method.assemble(self._base, self._method.taught_by(state))
            theirs, trajectory = self._draw(teacher, self._subjects["step"][0], self._teacher_ctx)
            beside.append(("teacher", theirs))
            values["teacher_style"] = gauges.style_distance(theirs, self._targets).mean()
            trajectories.append(trajectory)
        self._write_all(metrics, step, drawn, self._untuned, beside)
        shown = [sampling.decode(self._pipe, jnp.asarray(x0)) for x0 in trajectories]
        columns = [(f"x0, s = {s}", np.stack(at)) for s, at in enumerate(zip(*shown, strict=True))]
        self._write(metrics, step, "trajectory", previews.grid(columns))
        for number, earlier in enumerate(self._earlier, 1):
            columns, style = earlier.drawn(student)
            self._write(metrics, step, f"earlier{number}", previews.grid(columns))
            if style is not None:
                values[f"style_{number}"] = style
        if self._moved:
            drawn, untuned = self._moved.drawn(state.student), self._moved.untuned
            self._write_all(metrics, step, drawn, untuned, kind=gauges.MOVED)
            values |= {gauges.MOVED + k: v for k, v in self._values(drawn, untuned).items()}
        metrics.gauges(step, values)
        log.info("gauges: %s", ", ".join(f"{k} {v:.3g}" for k, v in values.items()))

    def _values(
        self, drawn: dict[str, np.ndarray], untuned: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """The gauges of a model's pictures beside the untuned one's."""
        values = {
            name: gauges.style_distance(pictures["step"], self._targets).mean()
            for name, pictures in (("style", drawn), ("untuned_style", untuned))
        }
        if "gauge" in drawn:
            values |= gauges.retention(drawn["gauge"], untuned["gauge"])
        return values

    def _write_all(
        self, metrics: Metrics, step: int, drawn: dict[str, np.ndarray],
        untuned: dict[str, np.ndarray], beside: Sequence[tuple[str, np.ndarray]] = (),
        kind: str = "",
    ) -> None:
        """A grid for every subject; `beside`: further columns of the training rows."""
        for name, pictures in drawn.items():
            columns = [("base", untuned[name]), ("student", pictures)]
            if name == "step":
                columns = [
                    *((f"reference {i}", p) for i, p in enumerate(self._references, 1)),
                    (self._target_name, self._targets), *columns, *beside,
                ]
            self._write(metrics, step, kind + name, previews.grid(columns))

    def _write(self, metrics: Metrics, step: int, name: str, pixels: np.ndarray) -> None:
        if distributed.is_main():
            previews.save(self._workdir / "samples" / f"{name}_{step:06d}.png", pixels)
            metrics.image(step, name, pixels)
