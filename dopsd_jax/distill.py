"""Step distillation: the student's one step must do what the teacher does in several.

The student walks its own few steps; at each of its states the frozen base, with guidance,
integrates to the next one in finer steps, and the student's velocity is moved toward the mean
velocity of that path. As in `rollout`, no gradient crosses steps.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from dopsd_jax import flow
from dopsd_jax.core.trees import Tree
from dopsd_jax.guidance import GuidedContext, guided
from dopsd_jax.models.denoiser import Context
from dopsd_jax.rollout import Velocity, trajectory


@flax.struct.dataclass
class DistillBatch:
    """One update's data.

    Attributes:
        noise: float32 [B, h, w, C], where every walk starts.
        latents: float32 [B, h, w, C], real pictures.
        from_data: bool [B]; these rows do not walk: every state is their noised picture.
        ctx: What both see, B rows.
        empty: The empty prompt's context, B rows, for guidance.
    """

    noise: jax.Array
    latents: jax.Array
    from_data: jax.Array
    ctx: Context
    empty: Context


def segments(num_steps: int, substeps: int, shift: float) -> jax.Array:
    """The fine schedule cut at the coarse one's states: float32 [S, substeps + 1]."""
    fine = flow.sigmas_shifted(num_steps * substeps, shift)
    starts = jnp.arange(num_steps)[:, None] * substeps
    return jnp.asarray(fine)[starts + jnp.arange(substeps + 1)]


def distill_loss_and_grad(
    student: Tree,
    base: Tree,
    batch: DistillBatch,
    sigmas: jax.Array,
    *,
    velocity: Velocity,
    assemble: Callable[[Tree, Tree], Tree],
    guidance: float,
) -> tuple[Tree, dict[str, jax.Array]]:
    """Gradient of one on-policy walk, and its metrics.

    Args:
        student: Trained LoRA.
        base: Frozen tree; by itself it is the teacher.
        batch: Noise, pictures and contexts.
        sigmas: float32 [S, m + 1], from `segments`.
        velocity: (variables, x, sigma, ctx) -> v.
        assemble: (base, trained) -> variables of the network.
        guidance: Scale of the guidance of the base.

    Returns:
        grads, and {loss, step_loss [S]}: mean squared differences of mean velocities.
    """
    num_steps = sigmas.shape[0]
    led = GuidedContext(batch.ctx, batch.empty, jnp.float32(guidance))

    def loss_at(student, x, target, sigma):
        v = velocity(assemble(base, student), x, sigma, batch.ctx)
        return jnp.mean(jnp.square(v - target)) / num_steps, v

    def step(carry, fine):
        x, grads = carry
        sigma, sigma_next = fine[0], fine[-1]
        noised = flow.noised(batch.latents, batch.noise, sigma)
        x = jnp.where(batch.from_data[:, None, None, None], noised, x)
        end, _ = trajectory({"params": base}, x, led, fine, velocity=guided(velocity))
        target = jax.lax.stop_gradient((end - x) / (sigma_next - sigma))
        (value, v), g = jax.value_and_grad(loss_at, has_aux=True)(student, x, target, sigma)
        grads = jax.tree.map(jnp.add, grads, g)
        return (jax.lax.stop_gradient(flow.euler_step(x, v, sigma, sigma_next)), grads), value

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), student)
    (_, grads), values = jax.lax.scan(step, (batch.noise, zeros), sigmas)
    return grads, {"loss": jnp.sum(values), "step_loss": values * num_steps}
