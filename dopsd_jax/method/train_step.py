"""TrainState and the one jitted step: rollout, gradient, clip, AdamW, teacher."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from dopsd_jax.core.trees import Tree, cast_floats, round_like
from dopsd_jax.method import baselines, dora, lora, moments, rollout
from dopsd_jax.models.denoiser import Context

TEACHERS = ("ema", "frozen", "live", "untuned")
TRAINABLE = ("lora", "full")
OPTIMIZERS = ("adamw", "muon")


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to continue; the frozen base is not part of it.

    Attributes:
        step: int32 scalar, optimizer updates done.
        student: Trained tree, float32.
        teacher: Tree of the same structure, float32 or bfloat16.
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
    """One update's data.

    Attributes:
        noise: float32 [B, h, w, C].
        student_ctx, teacher_ctx: Contexts of B rows; of the teacher None without one.
        sigmas: float32 [S + 1], the rollout's schedule.
        latents: float32 [B, h, w, C], the targets; None where nothing asks for them.
        sigma: float32 [B], a noise level per row, of flow matching only.
        kept: bool [B], the rows that only keep the student as it was; None for none.
    """

    noise: jax.Array
    student_ctx: Context
    teacher_ctx: Context | None
    sigmas: jax.Array
    latents: jax.Array | None = None
    sigma: jax.Array | None = None
    kept: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """The choices of the method that are fixed at compile time.

    Attributes:
        trainable: "lora" or "full".
        lora_scale: alpha / rank.
        teacher: "ema" (teacher follows the student), "frozen" (as initialised), "live" (the student
            itself) or "untuned" (the network without anything that was trained, now or earlier).
        ema_decay: Decay of the "ema" teacher per update.
        ema_warmup: Average over fewer updates at first, decay (1 + n) / (10 + n) if that is less:
            for averages of weights that start at random, not for teachers.
        loss: "x0" or "velocity".
        states: "student" (on-policy), "teacher" or "noised", see rollout.
        accumulation: Micro-batches per update; divides the batch.
        anchor: Weight of the distance to the model to be retained, see `rollout.Retention`.
        keeps: Whether some rows of a batch only keep the student near it.
    """

    trainable: str = "lora"
    lora_scale: float = 2.0
    teacher: str = "ema"
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    loss: str = "x0"
    states: str = "student"
    accumulation: int = 1
    anchor: float = 0.0
    keeps: bool = False

    def __post_init__(self):
        for name, allowed in (
            ("trainable", TRAINABLE), ("teacher", TEACHERS), ("loss", rollout.LOSSES),
            ("states", rollout.STATES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1], got {self.ema_decay}")
        if self.accumulation < 1:
            raise ValueError(f"accumulation: expected at least 1, got {self.accumulation}")
        if not self.anchor >= 0:
            raise ValueError(f"anchor: expected 0 or a number above it, got {self.anchor}")

    @property
    def retains(self) -> bool:
        """Whether the loss asks a model to be retained."""
        return self.anchor > 0 or self.keeps

    @property
    def needs_base(self) -> bool:
        """Whether weights stay beside those that train."""
        return self.trainable == "lora" or self.retains or self.teacher == "untuned"

    def taught_by(self, state: TrainState) -> Tree | None:
        """What `assemble` makes the teacher of."""
        return {"live": state.student, "untuned": None}.get(self.teacher, state.teacher)

    def assemble(self, base: Tree | None, trained: Tree | None) -> Tree:
        """Variables of the network: the roles are arguments, not modes.

        Args:
            base: What does not train: {"params"}; "lora", with alpha / rank in its `b`, where
                earlier LoRAs stay beside the one that trains; and "norms" of a DoRA, see
                `dora.column_norms`. Not read where everything trains. "start", if there, is for
                `retained` alone.
            trained: A LoRA, or all parameters; None for the untuned network.
        """
        if trained is None:
            return {"params": base["params"]}
        if self.trainable == "full":
            return {"params": trained}
        tree = lora.scaled(trained, self.lora_scale)
        if "norms" in base:
            tree = dora.ready(tree, base["params"], base["norms"])
        if "lora" in base:
            tree = lora.combined([base["lora"], tree])
        return {"params": base["params"], "lora": tree}


def make_optimizer(
    *, learning_rate: float, warmup_steps: int, b1: float, b2: float, eps: float,
    weight_decay: float, max_grad_norm: float, optimizer: str = "adamw", decay_steps: int = 0,
    num_train_steps: int = 0, moments_dtype: str = "float32", stacks: Sequence[str] = (),
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW or Muon.

    The rate warms up linearly from lr / warmup_steps, stays, and falls linearly to 0 over the last
    `decay_steps` of `num_train_steps`.

    Args:
        optimizer: "adamw", or "muon": orthogonalised momentum for the kernels inside blocks, its
            steps scaled to the size of Adam's, and Adam for everything else.
        moments_dtype: In which the moments are kept between updates, see moments.py; "int8" for
            "adamw" alone.
        stacks: Of "muon": regexes of the names under which blocks stand in the parameters.

    Raises:
        ValueError: Unknown optimizer, or int8 for one that is not AdamW.
    """
    if optimizer == "muon" and moments_dtype == "int8":
        raise ValueError("moments_dtype int8: expected optimizer adamw, got muon")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {OPTIMIZERS}, got {optimizer!r}")
    if optimizer == "muon" and not stacks:
        raise ValueError("optimizer muon: expected the names of the stacks of blocks, got none")

    def schedule(count):
        rate = learning_rate * jnp.minimum(1.0, (count + 1) / max(warmup_steps, 1))
        if decay_steps:
            rate *= jnp.clip((num_train_steps - count) / decay_steps, 0.0, 1.0)
        return rate

    if optimizer == "muon":
        update = optax.contrib.muon(
            schedule, adam_b1=b1, adam_b2=b2, eps=eps, weight_decay=weight_decay,
            adam_weight_decay=weight_decay, consistent_rms=0.2,
            muon_weight_dimension_numbers=functools.partial(_muon_dimensions, stacks=stacks),
        )
    else:
        update = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    update = optax.chain(optax.clip_by_global_norm(max_grad_norm), update)
    if moments_dtype == "float32":
        return update
    if moments_dtype == "int8":
        return moments.quantised(update)
    return moments.rounded(jnp.dtype(moments_dtype), update)


def method_of(config: ConfigDict) -> Method:
    """The method of a run's config; without `ema_warmup`, as its weights do not start at random."""
    return Method(
        trainable=config.trainable, lora_scale=config.lora.alpha / config.lora.rank,
        teacher=config.teacher, ema_decay=config.ema_decay, loss=config.loss,
        states=config.states, accumulation=config.accumulation, anchor=config.anchor,
        keeps=config.keep_share > 0,
    )


def optimizer_of(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of a run's config."""
    return make_optimizer(**optimizer_settings(config))


def optimizer_settings(config: ConfigDict) -> dict[str, Any]:
    """What `make_optimizer` takes from a run's config."""
    return {k: config[k] for k in (
        "learning_rate", "warmup_steps", "b1", "b2", "eps", "weight_decay", "max_grad_norm",
        "moments_dtype",
    )}


def _muon_dimensions(params: Tree, stacks: Sequence[str]) -> Tree:
    """Which axes of a kernel are its inputs and outputs; None where Muon does not apply."""
    def dimensions(path, x):
        names = [k.key for k in path]
        in_block = any(re.fullmatch(stack, n) for stack in stacks for n in names[:-1])
        if names[-1] != "kernel" or not in_block:
            return None
        kind = optax.contrib.MuonDimensionNumbers
        if x.ndim == 4:  # convolution [kh, kw, in, out]
            return kind((0, 1, 2), 3)
        return kind(x.ndim - 2, x.ndim - 1)  # leading axes are layers

    return jax.tree_util.tree_map_with_path(dimensions, params)


def init_state(
    student: Tree, optimizer: optax.GradientTransformation, rng: jax.Array,
    teacher_dtype: jnp.dtype = jnp.dtype("float32"),
) -> TrainState:
    """State at step 0: the teacher starts as a copy of the student, in its own dtype."""
    # A true copy: the step donates its state, and a buffer that serves two trees cannot be donated
    # twice.
    return TrainState(
        step=jnp.zeros((), jnp.int32), student=student,
        teacher=jax.tree.map(lambda x: jnp.array(x, teacher_dtype, copy=True), student),
        opt_state=optimizer.init(student), rng=rng,
    )


def draw_noise(rng: jax.Array, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Start of the rollout of one step: float32 standard normal, a function of (rng, step)."""
    return jax.random.normal(jax.random.fold_in(rng, step), shape, jnp.float32)


def retained(base: Tree) -> Tree:
    """Variables of the network as it is to be retained: as in base["start"], or untuned."""
    return {"params": base["params"]} | base.get("start", {})


Objective = Callable[[Tree, Tree, Tree, Any], tuple[Tree, dict[str, jax.Array]]]


def dopsd(method: Method, velocity: rollout.Velocity) -> Objective:
    """The method itself: (student, teacher, base, Batch) -> gradient, {loss, step_loss [S]}.

    Where it asks a model to be retained, the parts of the loss are there too, as `loss_teacher`,
    `loss_anchor` and `loss_kept`.
    """
    def objective(student, teacher, base, batch: Batch):
        retention = None
        if method.retains:
            retention = rollout.Retention(retained(base), method.anchor, batch.kept)
        loss, grads, metrics = rollout.dopsd_loss_and_grad(
            student, teacher, base, batch.noise, batch.student_ctx, batch.teacher_ctx,
            batch.sigmas, velocity=velocity, assemble=method.assemble, loss=method.loss,
            states=method.states, latents=batch.latents, retention=retention,
        )
        terms = {f"loss_{name}": term for name, term in metrics.get("terms", {}).items()}
        return grads, {"loss": loss, "step_loss": metrics["step_loss"]} | terms

    return accumulated(objective, method.accumulation)


def sft(method: Method, velocity: rollout.Velocity) -> Objective:
    """Plain fine-tuning: (student, teacher, base, Batch) -> gradient, {loss}.

    Of the batch it reads noise, latents, sigma and student_ctx.
    """
    def objective(student, teacher, base, batch: Batch):
        loss, grads = baselines.sft_loss_and_grad(
            student, base, batch.noise, batch.latents, batch.sigma, batch.student_ctx,
            velocity=velocity, assemble=method.assemble,
        )
        return grads, {"loss": loss}

    return accumulated(objective, method.accumulation)


def accumulated(objective: Objective, parts: int) -> Objective:
    """The mean of an objective over `parts` equal parts of a Batch, one after the other."""
    if parts == 1:
        return objective

    def in_parts(student, teacher, base, batch: Batch):
        if batch.noise.shape[0] % parts:
            raise ValueError(
                f"batch_size: expected a multiple of accumulation = {parts}, got "
                f"{batch.noise.shape[0]}"
            )
        rows = batch.replace(sigmas=None)
        rows = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)

        def one(part):
            return objective(student, teacher, base, part.replace(sigmas=batch.sigmas))

        # A scan, not a sum over a Python loop: one part's activations are in memory at a time, and
        # the program holds the objective once.
        def add(total, part):
            return jax.tree.map(lambda t, n: t + n / parts, total, one(part)), None

        shapes = jax.eval_shape(lambda: one(jax.tree.map(lambda x: x[0], rows)))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, rows)[0]

    return in_parts


def make_train_step(
    method: Method, optimizer: optax.GradientTransformation, objective: Objective
) -> Callable[[TrainState, Tree, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure step (state, base, batch) -> state, metrics, to be jitted with state donated.

    Args:
        method: Its `teacher` and `ema_decay` say how the teacher follows.
        optimizer: From `make_optimizer`.
        objective: Gradient and metrics of one batch, such as `dopsd(method, velocity)`.

    Returns:
        The step. To the objective's metrics it adds `grad_norm` (before clipping) and
        `update_norm`.
    """
    def train_step(state: TrainState, base: Tree, batch):
        # A live teacher is the student of this very step, in the teacher's context.
        grads, metrics = objective(state.student, method.taught_by(state), base, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.student)
        student = optax.apply_updates(state.student, updates)
        # The teacher follows last: it averages in the student that this update has made, so that
        # with decay 0 it equals the student at every step, while the loss above saw the old one.
        next_teacher = state.teacher
        if method.teacher == "ema":
            decay = method.ema_decay
            if method.ema_warmup:
                decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
            averaged = lora.ema(cast_floats(state.teacher, jnp.float32), student, decay)
            # With decay 0.9999 the average moves by less than bfloat16 resolves: rounded to the
            # nearest it would stand still, rounded at random it moves as it should on average.
            # The key follows from the step alone, so a resumed run rounds as it would have.
            rng = jax.random.fold_in(jax.random.key(1), state.step)
            next_teacher = round_like(averaged, state.teacher, rng)
        # Clipping is the optimizer's first link: this is the gradient before it.
        metrics |= {
            "grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)
        }
        state = state.replace(
            step=state.step + 1, student=student, teacher=next_teacher, opt_state=opt_state
        )
        return state, metrics

    return train_step
