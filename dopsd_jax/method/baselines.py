"""What people do instead of D-OPSD, for comparison: plain fine-tuning on the pictures themselves.

The off-policy forms of self-distillation are D-OPSD with other `states`, see rollout.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dopsd_jax.core.trees import Tree
from dopsd_jax.method import flow
from dopsd_jax.method.rollout import Velocity
from dopsd_jax.models.denoiser import Context


def flow_matching_loss(
    velocity: Velocity, variables: Tree, latents: jax.Array, noise: jax.Array, sigma: jax.Array,
    ctx: Context,
) -> jax.Array:
    """Mean squared error of the velocity at (1 - sigma) latents + sigma noise, float32 [B].

    Args:
        velocity: (variables, x, sigma, ctx) -> v.
        variables: Of the network.
        latents, noise: float32 [B, h, w, C].
        sigma: float32 [B].
        ctx: Context of B rows.
    """
    x = flow.noised(latents, noise, sigma[:, None, None, None])
    v = velocity(variables, x, sigma, ctx)
    return jnp.mean(jnp.square(v - (noise - latents)), (1, 2, 3))


def draw_sigma(rng: jax.Array, step: jax.Array, count: int, shift: float) -> jax.Array:
    """Noise levels as sampling spaces them: uniform, then shifted. float32 [count] in (0, 1).

    A function of (rng, step), and other numbers than `train_step.draw_noise` draws from the same.
    """
    rng = jax.random.fold_in(jax.random.fold_in(rng, step), 1)
    u = jax.random.uniform(rng, (count,), jnp.float32, 1e-3, 1.0)
    return shift * u / (1 + (shift - 1) * u)


def sft_loss_and_grad(
    student: Tree, base: Tree, noise: jax.Array, latents: jax.Array, sigma: jax.Array,
    ctx: Context, *, velocity: Velocity, assemble: Callable[[Tree, Tree], Tree],
) -> tuple[jax.Array, Tree]:
    """Plain fine-tuning: flow matching on the targets, and its gradient in the student.

    Args:
        student: Trained tree (LoRA, or all parameters).
        base: Frozen tree, or None where everything trains.
        noise, latents: float32 [B, h, w, C].
        sigma: float32 [B].
        ctx: What the student sees.
        velocity: (variables, x, sigma, ctx) -> v.
        assemble: (base, trained) -> variables of the network.

    Returns:
        loss: float32 scalar.
        grads: Tree like `student`.
    """
    def loss(student):
        variables = assemble(base, student)
        return jnp.mean(flow_matching_loss(velocity, variables, latents, noise, sigma, ctx))

    return jax.value_and_grad(loss)(student)
