"""Pictures of a run: the preflight's before it, previews and their gauges along the way."""

from __future__ import annotations

from pathlib import Path

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
from dopsd_jax.method import flow, sampling
from dopsd_jax.method.train_step import Method, TrainState
from dopsd_jax.run import gauges, preflight, previews
from dopsd_jax.run.features import BatchFeatures
from dopsd_jax.weights.pipeline import Pipeline

PREFLIGHT_PICTURES = 8


def have_pictures(data: Data, rows: BatchRows) -> bool:
    """Whether every one of the rows has a target."""
    return all(data.rows[i].target for i in rows.rows)


class Artist:
    """Draws in the run's preview steps: (variables, noise, ctx) -> pictures, and x0 of row 0."""

    def __init__(self, config, pipe: Pipeline, mesh: Mesh, bucket: Bucket):
        self._pipe, self._everywhere = pipe, sharding.replicated(mesh)
        steps = config.sample_steps
        shift = config.shift or pipe.shift_at(steps, bucket.height, bucket.width)
        self._sigmas = flow.sigmas_shifted(steps, shift)

    def __call__(self, variables, noise, ctx) -> tuple[np.ndarray, np.ndarray]:
        noise, ctx, sigmas = sharding.place((noise, ctx, self._sigmas), self._everywhere)
        x, x0 = sharding.fetch(
            sampling.sample_trajectory(self._pipe.denoiser, variables, noise, ctx, sigmas)
        )
        return sampling.decode(self._pipe, jnp.asarray(x)), x0[:, 0]


def run_preflight(config, workdir: Path, pipe: Pipeline, data: Data, ctxs: BatchFeatures,
                  variables: trees.Tree, mesh: Mesh) -> None:
    """Compares untrained student and teacher; writes preflight.json and its pictures."""
    rows = data.first_rows(PREFLIGHT_PICTURES, repeat=True)
    if not have_pictures(data, rows):
        log.info("preflight: left out; rows without pictures leave it nothing to compare with")
        return
    targets = to_uint8(np.stack([data.pixels(i) for i in rows.rows]))
    student_ctx, teacher_ctx, _ = ctxs.batch(rows)
    shape = pipe.denoiser.latent_shape(rows.bucket.height, rows.bucket.width)
    noise = sampling.draw_noise([config.seed + 3000 + i for i in range(len(rows.rows))], shape)
    draw = Artist(config, pipe, mesh, rows.bucket)
    student, teacher = (draw(variables, noise, ctx)[0] for ctx in (student_ctx, teacher_ctx))
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
        self._draw = Artist(config, pipe, mesh, rows.bucket)
        self._base, _ = self._draw(untuned, self._noise, self._ctx)

    def drawn(self, student: trees.Tree) -> tuple[list[tuple[str, np.ndarray]], float | None]:
        """Columns of a grid, and the distance in style to that task's targets if it has any."""
        ours, _ = self._draw(student, self._noise, self._ctx)
        columns = [("base", self._base), ("student", ours)]
        if self._targets is None:
            return columns, None
        style = gauges.style_distance(ours, self._targets).mean()
        return [("target", self._targets), *columns], style


class Previews:
    """Grids of base, student and any teacher, and their trajectories, of one bucket's rows."""

    def __init__(self, config, workdir: Path, pipe: Pipeline, data: Data, ctxs: BatchFeatures,
                 method: Method, base: trees.Tree, untuned: trees.Tree, mesh: Mesh):
        """`untuned`: variables of the model without any LoRA; drawn now, and not stored."""
        self._workdir, self._pipe, self._method, self._base = workdir, pipe, method, base
        rows = data.first_rows(config.sample_rows)
        self._draw = Artist(config, pipe, mesh, rows.bucket)
        self._targets, self._references = None, []
        if have_pictures(data, rows):
            *self._references, self._targets = (
                to_uint8(np.stack([data.pixels(i, image) for i in rows.rows]))
                for image in range(rows.bucket.references + 1)
            )
        self._student_ctx, self._teacher_ctx, _ = ctxs.batch(rows)
        shape = pipe.denoiser.latent_shape(rows.bucket.height, rows.bucket.width)
        self._noise = sampling.draw_noise([config.seed + i for i in range(len(rows.rows))], shape)
        self._prompt_ctx = self._gauge_ctx = None
        if config.sample_prompts:
            self._prompt_ctx = ctxs.prompts(config.sample_prompts)
            seeds = [config.seed + 1000 + i for i in range(len(config.sample_prompts))]
            self._prompt_noise = sampling.draw_noise(seeds, shape)
        if config.gauge_prompts:
            self._gauge_ctx = ctxs.prompts(config.gauge_prompts)
            seeds = [config.seed + 2000 + i for i in range(len(config.gauge_prompts))]
            self._gauge_noise = sampling.draw_noise(seeds, shape)
        # Now, because full fine-tuning may keep no base and a resumed run's student has moved.
        self._base_rows, _ = self._draw(untuned, self._noise, self._student_ctx)
        self._target_name = "target"
        if self._targets is None:  # then what the untuned teacher draws is what to become
            self._target_name = "untuned teacher"
            self._targets, _ = self._draw(untuned, self._noise, self._teacher_ctx)
        self._untuned_style = gauges.style_distance(self._base_rows, self._targets).mean()
        self._earlier = [
            EarlierRows(config, pipe, earlier, ctxs, untuned, mesh) for earlier in data.earlier
        ]
        if self._prompt_ctx is not None:
            self._base_prompts, _ = self._draw(untuned, self._prompt_noise, self._prompt_ctx)
        if self._gauge_ctx is not None:
            self._base_gauge, _ = self._draw(untuned, self._gauge_noise, self._gauge_ctx)

    def save(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Writes step_N, trajectory_N, prompts_N and gauge_N.png in samples/, and the gauges."""
        student = self._method.assemble(self._base, state.student)
        ours, trajectory = self._draw(student, self._noise, self._student_ctx)
        shown, trajectories = [("student", ours)], [trajectory]
        values = {"style": gauges.style_distance(ours, self._targets).mean(),
                  "untuned_style": self._untuned_style}
        if self._teacher_ctx is not None:
            teacher = self._method.assemble(
                self._base, state.student if self._method.teacher == "live" else state.teacher
            )
            theirs, trajectory = self._draw(teacher, self._noise, self._teacher_ctx)
            shown.append(("teacher", theirs))
            values["teacher_style"] = gauges.style_distance(theirs, self._targets).mean()
            trajectories.append(trajectory)
        self._write(metrics, step, "step", previews.grid(
            [*((f"reference {i}", pictures) for i, pictures in enumerate(self._references, 1)),
             (self._target_name, self._targets), ("base", self._base_rows), *shown]
        ))
        drawn = [sampling.decode(self._pipe, jnp.asarray(x0)) for x0 in trajectories]
        columns = [(f"x0, s = {s}", np.stack(at)) for s, at in enumerate(zip(*drawn, strict=True))]
        self._write(metrics, step, "trajectory", previews.grid(columns))
        if self._prompt_ctx is not None:
            ours, _ = self._draw(student, self._prompt_noise, self._prompt_ctx)
            columns = [("base", self._base_prompts), ("student", ours)]
            self._write(metrics, step, "prompts", previews.grid(columns))
        if self._gauge_ctx is not None:
            ours, _ = self._draw(student, self._gauge_noise, self._gauge_ctx)
            values |= gauges.retention(ours, self._base_gauge)
            columns = [("base", self._base_gauge), ("student", ours)]
            self._write(metrics, step, "gauge", previews.grid(columns))
        for number, earlier in enumerate(self._earlier, 1):
            columns, style = earlier.drawn(student)
            self._write(metrics, step, f"earlier{number}", previews.grid(columns))
            if style is not None:
                values[f"style_{number}"] = style
        metrics.gauges(step, values)
        log.info("gauges: %s", ", ".join(f"{k} {v:.3g}" for k, v in values.items()))

    def _write(self, metrics: Metrics, step: int, name: str, pixels: np.ndarray) -> None:
        if distributed.is_main():
            previews.save(self._workdir / "samples" / f"{name}_{step:06d}.png", pixels)
            metrics.image(step, name, pixels)
