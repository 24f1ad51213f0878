"""TrainState and the one jitted step: rollout, gradient, clip, AdamW, teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dopsd_jax import lora, rollout
from dopsd_jax.core.trees import Tree
from dopsd_jax.models.denoiser import Context

TEACHERS = ("ema", "frozen", "live")
TRAINABLE = ("lora", "full")


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to continue; the frozen base is not part of it.

    Attributes:
        step: int32 scalar, optimizer updates done.
        student: Trained tree, float32.
        teacher: Tree of the same structure.
        opt_state: Optax state.
        rng: PRNG key of the run; never consumed, always folded with the step.
    """

    step: jax.Array
    student: Tree
    teacher: Tree
    opt_state: Any
    rng: jax.Array


@flax.struct.dataclass
class Batch:
    """One update's data: `noise` [B, h, w, C] float32, contexts of B rows, `sigmas` [S + 1]."""

    noise: jax.Array
    student_ctx: Context
    teacher_ctx: Context
    sigmas: jax.Array


@dataclasses.dataclass(frozen=True)
class Method:
    """The choices of the method that are fixed at compile time.

    Attributes:
        trainable: "lora" or "full".
        lora_scale: alpha / rank.
        teacher: "ema" (teacher follows the student), "frozen" (as initialised) or "live".
        ema_decay: Decay of the "ema" teacher per update.
        loss: "x0" or "velocity".
        accumulation: Micro-batches per update; divides the batch.
    """

    trainable: str = "lora"
    lora_scale: float = 2.0
    teacher: str = "ema"
    ema_decay: float = 0.9999
    loss: str = "x0"
    accumulation: int = 1

    def __post_init__(self):
        for name, allowed in (
            ("trainable", TRAINABLE), ("teacher", TEACHERS), ("loss", rollout.LOSSES)
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1], got {self.ema_decay}")
        if self.accumulation < 1:
            raise ValueError(f"accumulation: expected at least 1, got {self.accumulation}")

    def assemble(self, base: Tree, trained: Tree) -> Tree:
        """Variables of the network: the roles are arguments, not modes."""
        if self.trainable == "full":
            return {"params": trained}
        return {"params": base, "lora": lora.scaled(trained, self.lora_scale)}


def make_optimizer(
    *, learning_rate: float, warmup_steps: int, b1: float, b2: float, eps: float,
    weight_decay: float, max_grad_norm: float,
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; linear warm-up from lr / warmup_steps, then constant."""
    def schedule(count):
        return learning_rate * jnp.minimum(1.0, (count + 1) / max(warmup_steps, 1))

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )


def init_state(
    student: Tree, optimizer: optax.GradientTransformation, rng: jax.Array
) -> TrainState:
    """State at step 0: the teacher starts as a copy of the student."""
    return TrainState(
        step=jnp.zeros((), jnp.int32), student=student, teacher=jax.tree.map(jnp.copy, student),
        opt_state=optimizer.init(student), rng=rng,
    )


def draw_noise(rng: jax.Array, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Start of the rollout of one step: float32 standard normal, a function of (rng, step)."""
    return jax.random.normal(jax.random.fold_in(rng, step), shape, jnp.float32)


def make_train_step(
    method: Method, optimizer: optax.GradientTransformation, velocity: rollout.Velocity
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure step (state, base, batch) -> state, metrics, to be jitted with state donated.

    Metrics: `loss`, `grad_norm` (before clipping), `update_norm`, `step_loss` [S].
    """
    def loss_and_grad(student, teacher, base, batch: Batch):
        loss, grads, metrics = rollout.dopsd_loss_and_grad(
            student, teacher, base, batch.noise, batch.student_ctx, batch.teacher_ctx,
            batch.sigmas, velocity=velocity, assemble=method.assemble, loss=method.loss,
        )
        return grads, {"loss": loss, "step_loss": metrics["step_loss"]}

    def accumulated(student, teacher, base, batch: Batch):
        parts = method.accumulation
        if parts == 1:
            return loss_and_grad(student, teacher, base, batch)
        if batch.noise.shape[0] % parts:
            raise ValueError(
                f"batch_size: expected a multiple of accumulation = {parts}, got "
                f"{batch.noise.shape[0]}"
            )
        rows = batch.replace(sigmas=None)
        rows = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)

        def add(total, part):
            new = loss_and_grad(student, teacher, base, part.replace(sigmas=batch.sigmas))
            return jax.tree.map(lambda t, n: t + n / parts, total, new), None

        shapes = jax.eval_shape(
            lambda: loss_and_grad(
                student, teacher, base,
                jax.tree.map(lambda x: x[0], rows).replace(sigmas=batch.sigmas),
            )
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, rows)[0]

    def train_step(state: TrainState, base: Tree, batch: Batch):
        teacher = state.student if method.teacher == "live" else state.teacher
        grads, metrics = accumulated(state.student, teacher, base, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.student)
        student = optax.apply_updates(state.student, updates)
        next_teacher = state.teacher
        if method.teacher == "ema":
            next_teacher = lora.ema(state.teacher, student, method.ema_decay)
        metrics |= {
            "grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)
        }
        state = state.replace(
            step=state.step + 1, student=student, teacher=next_teacher, opt_state=opt_state
        )
        return state, metrics

    return train_step
