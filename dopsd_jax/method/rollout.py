"""D-OPSD: the student samples its own few-step trajectory; the loss is at each of its states.

No gradient crosses rollout steps, so value-and-grad lives inside the scan and gradients add up in
its carry: the memory of one step whatever the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from dopsd_jax.core.checks import check_shapes
from dopsd_jax.core.trees import Tree
from dopsd_jax.method import flow
from dopsd_jax.models.denoiser import Context

LOSSES = ("x0", "velocity")
STATES = ("student", "teacher", "noised")
Velocity = Callable[[Tree, jax.Array, jax.Array, Context], jax.Array]


def step_loss(v_student: jax.Array, v_teacher: jax.Array, sigma: jax.Array, loss: str) -> jax.Array:
    """Mean squared distance of student and teacher at one state, a float32 scalar.

    Both clean estimates start at the same x, so the x0 loss is exactly sigma^2 times the velocity
    loss: early, noisy steps weigh more. The paper writes the velocity loss; its code uses x0.
    """
    distance = jnp.mean(jnp.square(v_student - v_teacher))
    return jnp.square(sigma) * distance if loss == "x0" else distance


@flax.struct.dataclass
class Retention:
    """What pulls the student towards a frozen model, which sees the prompt alone as it does.

    One more forward pass at each state gives that model's prediction for all rows; it serves both.
    The loss of a row is D(student, teacher) + anchor D(student, frozen), and that of a kept row is
    D(student, frozen) alone; D is `step_loss`.

    Attributes:
        frozen: Variables of the network as it is to be retained, such as the untuned one.
        anchor: Weight of the distance to it, 0 for none.
        kept: bool [B], the rows whose only teacher it is; None for none.
    """

    frozen: Tree
    anchor: float = flax.struct.field(pytree_node=False, default=0.0)
    kept: jax.Array | None = None

    def losses(
        self, v_student: jax.Array, v_teacher: jax.Array, v_frozen: jax.Array, sigma: jax.Array,
        loss: str,
    ) -> dict[str, jax.Array]:
        """The terms of the mean over rows, which add up to it: teacher, anchor, kept."""
        kept = jnp.zeros(len(v_student), bool) if self.kept is None else self.kept
        per_row = jax.vmap(step_loss, (0, 0, None, None))
        to_frozen = per_row(v_student, v_frozen, sigma, loss)
        return {
            "teacher": jnp.mean(jnp.where(kept, 0, per_row(v_student, v_teacher, sigma, loss))),
            "anchor": self.anchor * jnp.mean(jnp.where(kept, 0, to_frozen)),
            "kept": jnp.mean(jnp.where(kept, to_frozen, 0)),
        }


def dopsd_loss_and_grad(
    student: Tree,
    teacher: Tree,
    base: Tree,
    noise: jax.Array,
    student_ctx: Context,
    teacher_ctx: Context,
    sigmas: jax.Array,
    *,
    velocity: Velocity,
    assemble: Callable[[Tree, Tree], Tree],
    loss: str = "x0",
    states: str = "student",
    latents: jax.Array | None = None,
    retention: Retention | None = None,
) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
    """One on-policy rollout with its loss and the gradient in the student.

    Args:
        student: Trained tree (LoRA, or all parameters).
        teacher: Tree of the same structure, or None for the untuned network; receives no gradient.
        base: Frozen tree, or None where everything trains.
        noise: float32 [B, h, w, C], the rollout's start.
        student_ctx: What the student sees.
        teacher_ctx: What the teacher sees.
        sigmas: float32 [S + 1], from 1 down to 0.
        velocity: (variables, x, sigma, ctx) -> v.
        assemble: (base, trained) -> variables of the network.
        loss: "x0" or "velocity", see `step_loss`.
        states: Where both predict. "student": on its own trajectory, which is the method; the
            others are off-policy, for comparison: "teacher", on the teacher's trajectory; "noised",
            at the noised target, with this noise at every step.
        latents: float32 [B, h, w, C], the targets, for "noised".
        retention: What keeps the student near a frozen model; None for nothing.

    Returns:
        loss: float32 scalar, the mean over the S steps.
        grads: Tree like `student`, float32.
        metrics: `step_loss` [S], and `x0` [B, h, w, C], the picture at the trajectory's end; with
            `retention` also `terms`, the parts of the loss by name (see `Retention.losses`).

    Raises:
        ValueError: Unknown loss or states, or shapes that do not fit.
    """
    check_shapes("dopsd_loss_and_grad", noise=(noise, "B h w C"), sigmas=(sigmas, "E"))
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")
    if states not in STATES:
        raise ValueError(f"states: expected one of {STATES}, got {states!r}")
    if states == "noised":
        if latents is None:
            raise ValueError("states noised: expected the targets' latents, got None")
        check_shapes("states noised", noise=(noise, "B h w C"), latents=(latents, "B h w C"))
    num_steps = sigmas.shape[0] - 1

    def loss_at(student, x, sigma):
        # The teacher is a target. Below, the gradient is taken in `student` alone, even where a
        # live teacher has the same values; stop_gradient says so, and holds for a caller who
        # differentiates more than that.
        v_teacher = velocity(assemble(base, jax.lax.stop_gradient(teacher)), x, sigma, teacher_ctx)
        v_student = velocity(assemble(base, student), x, sigma, student_ctx)
        v_teacher = jax.lax.stop_gradient(v_teacher)
        # The loss needs this velocity anyway, so the sampler's step costs no further evaluation.
        v_sampler = v_teacher if states == "teacher" else v_student
        if retention is None:
            return step_loss(v_student, v_teacher, sigma, loss) / num_steps, (v_sampler, {})
        v_frozen = jax.lax.stop_gradient(velocity(retention.frozen, x, sigma, student_ctx))
        terms = retention.losses(v_student, v_teacher, v_frozen, sigma, loss)
        terms = jax.tree.map(lambda term: term / num_steps, terms)
        return sum(terms.values()), (v_sampler, terms)

    def step(carry, sigma_pair):
        x, grads = carry
        sigma, sigma_next = sigma_pair
        if states == "noised":
            x = flow.noised(latents, noise, sigma)
        # Inside the scan: jax.grad of the whole scan would keep the activations of all its steps
        # for the backward pass. The sum of these gradients is the gradient of the summed loss,
        # because every state counts as a constant.
        (value, (v, terms)), g = jax.value_and_grad(loss_at, has_aux=True)(student, x, sigma)
        grads = jax.tree.map(lambda total, new: total + new.astype(total.dtype), grads, g)
        # Where the student got to is data for the next step, not a way to lower its loss: no
        # gradient crosses steps, not even if a caller differentiates the whole rollout.
        x = jax.lax.stop_gradient(flow.euler_step(x, v, sigma, sigma_next))
        return (x, grads), (value, terms)

    # The carry is float32 whatever the network computes in: over the steps, small moves add up to
    # a state, and small gradients to a gradient, and bfloat16 would lose them.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), student)
    (x, grads), (values, terms) = jax.lax.scan(
        step, (noise.astype(jnp.float32), zeros), (sigmas[:-1], sigmas[1:])
    )
    metrics = {"step_loss": values * num_steps, "x0": x}
    if retention is not None:
        metrics["terms"] = jax.tree.map(jnp.sum, terms)
    return jnp.sum(values), grads, metrics


def trajectory(
    variables: Tree, noise: jax.Array, ctx: Context, sigmas: jax.Array, *, velocity: Velocity
) -> tuple[jax.Array, jax.Array]:
    """Samples the same trajectory without a loss.

    Returns:
        x: float32 [B, h, w, C], the sample.
        x0: float32 [S, B, h, w, C], the clean estimate at every step.
    """
    def step(x, sigma_pair):
        sigma, sigma_next = sigma_pair
        v = velocity(variables, x, sigma, ctx)
        return flow.euler_step(x, v, sigma, sigma_next), flow.x0_from_velocity(x, v, sigma)

    return jax.lax.scan(step, noise.astype(jnp.float32), (sigmas[:-1], sigmas[1:]))
