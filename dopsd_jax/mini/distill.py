"""Step distillation: the student's one step must do what the teacher does in several.

The student samples its own few-step trajectory; at each of its states the frozen base, with
guidance, integrates to the next one in finer steps, and the student's velocity is moved toward the
mean velocity of that path. As in `rollout`, no gradient crosses steps.

A network that cannot follow those paths exactly learns their average, which is a blur. So the
picture at the end may also be moved to where the base finds it likelier than a critic does, which
is trained along with the student on the student's own pictures: matching of distributions, DMD
(arXiv 2311.18828), with the paths as its regression.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from dopsd_jax.core.trees import Tree
from dopsd_jax.method import flow
from dopsd_jax.method.baselines import flow_matching_loss
from dopsd_jax.method.guidance import GuidedContext, guided
from dopsd_jax.method.rollout import Velocity, trajectory
from dopsd_jax.models.denoiser import Context

STUDENT, CRITIC = "student", "critic"
LEVELS = (0.02, 0.98)  # between which a picture is noised to be judged


@flax.struct.dataclass
class DistillBatch:
    """One update's data.

    Attributes:
        noise: float32 [B, h, w, C], where every trajectory starts.
        latents: float32 [B, h, w, C], real pictures.
        from_data: bool [B]; these rows are not sampled: every state is their noised picture.
        ctx: What both see, B rows.
        empty: The empty prompt's context, B rows, for guidance.
        key: PRNG key of what else is drawn.
    """

    noise: jax.Array
    latents: jax.Array
    from_data: jax.Array
    ctx: Context
    empty: Context
    key: jax.Array


def segments(num_steps: int, substeps: int, shift: float) -> jax.Array:
    """The fine schedule cut at the coarse one's states: float32 [S, substeps + 1]."""
    fine = flow.sigmas_shifted(num_steps * substeps, shift)
    starts = jnp.arange(num_steps)[:, None] * substeps
    return jnp.asarray(fine)[starts + jnp.arange(substeps + 1)]


def matching_direction(x0: jax.Array, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Where the critic's guess of a picture lies from the base's, in units of how far that is off.

    Args:
        x0, real, fake: float32 [B, h, w, C]: the picture, and what the guided base and the critic
            make of it with noise on top.

    Source: DMD, equations 7 and 8; a step against it makes the picture likelier.
    """
    off = jnp.mean(jnp.abs(x0 - real), axis=(1, 2, 3), keepdims=True)
    return (fake - real) / jnp.maximum(off, 1e-3)


def _matching_losses(x0, critic, base, batch, led, velocity, assemble):
    """(loss whose gradient in x0 is the direction, the critic's own on these pictures)."""
    draws = jax.random.split(batch.key, 4)
    rows = (len(x0), 1, 1, 1)
    sigma, sigma_critic = (jax.random.uniform(k, rows[:1], minval=LEVELS[0], maxval=LEVELS[1])
                           for k in draws[:2])
    noise, noise_critic = (jax.random.normal(k, x0.shape) for k in draws[2:])

    fixed, level = jax.lax.stop_gradient(x0), sigma.reshape(rows)
    x = flow.noised(fixed, noise, level)
    real, fake = (
        flow.x0_from_velocity(x, v, level) for v in (
            guided(velocity)({"params": base}, x, sigma, led),
            velocity(assemble(base, critic), x, sigma, batch.ctx),
        )
    )
    wanted = jax.lax.stop_gradient(fixed - matching_direction(fixed, real, fake))
    matching = 0.5 * jnp.mean(jnp.square(x0 - wanted))
    own = flow_matching_loss(
        velocity, assemble(base, critic), fixed, noise_critic, sigma_critic, batch.ctx
    )
    return matching, jnp.mean(own)


def distill_loss_and_grad(
    trained: dict[str, Tree],
    base: Tree,
    batch: DistillBatch,
    sigmas: jax.Array,
    *,
    velocity: Velocity,
    assemble: Callable[[Tree, Tree], Tree],
    guidance: float,
    matching: float = 0.0,
    last_regression: float = 1.0,
) -> tuple[dict[str, Tree], dict[str, jax.Array]]:
    """Gradient of one on-policy trajectory, and its metrics.

    Args:
        trained: {"student": LoRA, "critic": LoRA}; the critic only where there is matching.
        base: Frozen tree; by itself it is the teacher.
        batch: Noise, pictures and contexts.
        sigmas: float32 [S, m + 1], from `segments`.
        velocity: (variables, x, sigma, ctx) -> v.
        assemble: (base, trained) -> variables of the network.
        guidance: Scale of the guidance of the base.
        matching: Weight of the matching of the last step's pictures, beside the mean of the S
            squared differences of velocities; 0 for none.
        last_regression: Weight of the last step's own share of that mean. 0 saves its path: with
            matching it can do without.

    Returns:
        grads, like `trained`, and {loss, step_loss [S]}: mean squared differences of mean
        velocities, of S - 1 steps where the last has no weight; with matching also {critic_loss}.
    """
    num_steps = sigmas.shape[0]
    led = GuidedContext(batch.ctx, batch.empty, jnp.float32(guidance))

    def state_at(x, sigma):
        noised = flow.noised(batch.latents, batch.noise, sigma)
        return jnp.where(batch.from_data[:, None, None, None], noised, x)

    def target_at(x, fine):
        end, _ = trajectory({"params": base}, x, led, fine, velocity=guided(velocity))
        return jax.lax.stop_gradient((end - x) / (fine[-1] - fine[0]))

    def loss_at(student, x, target, sigma):
        v = velocity(assemble(base, student), x, sigma, batch.ctx)
        return jnp.mean(jnp.square(v - target)) / num_steps, v

    def step(carry, fine):
        x, grads = carry
        x = state_at(x, fine[0])
        target = target_at(x, fine)
        (value, v), g = jax.value_and_grad(loss_at, has_aux=True)(
            trained[STUDENT], x, target, fine[0]
        )
        x = jax.lax.stop_gradient(flow.euler_step(x, v, fine[0], fine[-1]))
        return (x, jax.tree.map(jnp.add, grads, g)), value

    def last(trained, x, target, sigma):
        value, v = loss_at(trained[STUDENT], x, target, sigma)
        if not matching:
            return last_regression * value, (value, {})
        pulled, own = _matching_losses(
            flow.x0_from_velocity(x, v, sigma), trained[CRITIC], base, batch, led, velocity,
            assemble,
        )
        total = last_regression * value + matching * pulled + own
        return total, (value, {"critic_loss": own})

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained[STUDENT])
    (x, grads), values = jax.lax.scan(step, (batch.noise, zeros), sigmas[:-1])
    x = state_at(x, sigmas[-1, 0])
    target = target_at(x, sigmas[-1]) if last_regression else jnp.zeros_like(x)
    (_, (value, metrics)), last_grads = jax.value_and_grad(last, has_aux=True)(
        trained, x, target, sigmas[-1, 0]
    )
    grads = last_grads | {STUDENT: jax.tree.map(jnp.add, grads, last_grads[STUDENT])}
    if last_regression:
        values = jnp.append(values, value)
    return grads, {"loss": jnp.sum(values), "step_loss": values * num_steps} | metrics
