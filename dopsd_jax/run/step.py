"""The train step of a config, built in one place for every command that uses it.

train runs it, plan compiles it and bench times it. Method, optimizer, objective, LoRA targets, the
state and where it lies on the mesh, the options of jax.jit and the arrays of a batch are decided
here alone: a command that built any of them again could describe another step than the one that
trains.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from dopsd_jax.core import sharding, trees
from dopsd_jax.core.trees import Tree
from dopsd_jax.data.buckets import Bucket
from dopsd_jax.method import contexts, dora, flow, lokr, lora
from dopsd_jax.method.baselines import draw_sigma
from dopsd_jax.method.train_step import (
    Batch,
    Method,
    TrainState,
    dopsd,
    draw_noise,
    init_state,
    make_optimizer,
    make_train_step,
    method_of,
    optimizer_of,
    optimizer_settings,
    sft,
)
from dopsd_jax.models.denoiser import Context, Denoiser
from dopsd_jax.models.quantization import quantised_as, quantised_shapes
from dopsd_jax.run.config import needs_targets, needs_teacher
from dopsd_jax.weights.shapes import transformer_shapes

OBJECTIVES = {"dopsd": dopsd, "sft": sft}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a step is called with, as trees of ShapeDtypeStruct that know their shardings."""

    state: TrainState
    base: Tree | None
    batch: Batch


class Step:
    """A config's train step on a mesh; call it as (state, base, batch) -> state, metrics.

    Nothing is compiled before the first call, which then compiles once for every bucket.

    Attributes:
        method: The choices that are fixed at compile time.
        optimizer: Of the trained tree.
        targets: Regexes of the kernels that get a LoRA; None where all parameters train.
        state_shapes: The train state as ShapeDtypeStruct with shardings.
        base_shapes: The same of what does not train, see `Method.assemble`; None without any.
        rows: Which of a batch's rows this process has to provide, see `batch`.
    """

    def __init__(
        self, config: ConfigDict, denoiser: Denoiser, presets: Mapping[str, tuple[str, ...]],
        mesh: Mesh | AbstractMesh, earlier: Tree | None = None, start: Tree | None = None,
    ):
        """Builds the step from a config whose values are possible, see run/config.py.

        Args:
            config: Of a run.
            denoiser: The network; its weights are not needed.
            presets: LoRA targets of its family by name, see `lora.PRESETS`.
            mesh: An abstract one will do for shapes, not for compiling.
            earlier: The LoRAs of config.base_lora as one, alpha / rank in its `b`, or None.
            start: What to go on from: a LoRA as it is trained, alpha / rank in its `b`, or all
                parameters. None for a LoRA that changes nothing, or the network's own parameters.

        Raises:
            ValueError: LoRA targets that the network does not have, or a DoRA that would have to
                add up with another adapter.
        """
        self.method, self.optimizer = method_of(config), optimizer_of(config)
        self._config, self._mesh = config, mesh
        self._denoiser = dataclasses.replace(denoiser, mesh=mesh)
        self._rows, self._everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self._sigmas: dict[float, jax.Array] = {}
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        params = transformer_shapes(denoiser.network)
        self.targets = self.base_shapes = None
        self._of_norms: tuple[str, ...] = ()  # the layers of a DoRA
        if self.method.trainable == "lora":
            self.targets = lora.parse_targets(config.lora.targets, presets)
            if config.lora.kind == "dora":
                self._of_norms = tuple(
                    name.removesuffix("/kernel")
                    for name in lora.match_targets(params, self.targets)
                )
        if self.method.needs_base:
            dtype = jnp.dtype(config.dtype)
            kind = quantised_as("base_dtype", config.base_dtype)
            base = {"params": quantised_shapes(params, kind, dtype)}
            if earlier is not None:
                base["lora"] = quantised_shapes(earlier, "", jnp.float32)
            if self._of_norms:
                base["norms"] = jax.eval_shape(self._norms, params)
            if retained := self._retained(earlier, start, params):
                base["start"] = {
                    name: quantised_shapes(tree, "", jnp.float32 if name == "lora" else dtype)
                    for name, tree in retained.items()
                }
            self.base_shapes = self._placed(base)
        self._earlier, self._start = earlier, start
        norms = self.base_shapes["norms"] if self._of_norms else None
        self.state_shapes = self._placed(jax.eval_shape(self._first_state, params, norms))
        if earlier is not None:  # what cannot stand side by side is refused here
            jax.eval_shape(self.method.assemble, self.base_shapes, self.state_shapes.student)

    def _norms(self, params: Tree) -> Tree:
        return dora.column_norms(params, self._of_norms)

    def _retained(self, earlier: Tree | None, start: Tree | None, params: Tree) -> Tree:
        """What the model that the run begins with has in place of the untuned one's.

        Args:
            earlier, start: See `__init__`.
            params: Of the network, or their shapes; then shapes come back of what a DoRA becomes.
        """
        if not self.method.retains or self._config.retain == "untuned":
            return {}
        if self.targets is None:
            return {} if start is None else {"params": start}
        if start is not None and self._of_norms:
            shapes = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
            start = (jax.eval_shape if shapes else _jitted)(dora.ready, start, params)
        loras = [tree for tree in (earlier, start) if tree is not None]
        return {"lora": lora.combined(loras)} if loras else {}

    def _placed(self, shapes: Tree) -> Tree:
        return jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
            shapes, sharding.shard(self._mesh, shapes),
        )

    def _first_state(
        self, params: Tree, norms: Tree | None = None, start: Tree | None = None
    ) -> TrainState:
        rng = jax.random.key(self._config.seed)
        if self.targets is None:
            # Updates are far below the resolution of bfloat16 weights: what trains is float32.
            trained = trees.cast_floats(params if start is None else start, jnp.float32)
        else:
            trained = self._first_lora(jax.random.fold_in(rng, 1), params, norms)
            if start is not None:
                trained = lora.continued(start, trained, self.method.lora_scale)
        return init_state(
            trained, self.optimizer, jax.random.key_data(jax.random.fold_in(rng, 2)),
            jnp.dtype(self._config.ema_dtype),
        )

    def _first_lora(self, rng: jax.Array, params: Tree, norms: Tree | None) -> Tree:
        """An adapter of the config's kind that changes nothing."""
        config = self._config.lora
        if config.kind == "lokr":
            names = lora.match_targets(params, self.targets)
            return lokr.init(rng, params, names, config.rank, config.factor)
        made = lora.init(rng, params, self.targets, config.rank)
        return made if norms is None else dora.begun(made, norms)

    def init(self, params: Tree) -> tuple[Tree | None, TrainState]:
        """What does not train, None without any, and the state at step 0.

        Args:
            params: The network's parameters. They are given up: the base or the state may hold
                the same arrays, and calling the step frees those of the state.

        Raises:
            ValueError: A LoRA with other targets than the run's or a larger rank.
        """
        base, start, norms = None, self._start, None
        if self.base_shapes is not None:
            base = {"params": params}
            if self._of_norms:  # computed where the weights lie
                base["params"] = sharding.place(params, _where(self.base_shapes["params"]))
                where = _where(self.base_shapes["norms"])
                base["norms"] = norms = _jitted(self._norms, base["params"], where=where)
            if self._earlier is not None:
                base["lora"] = self._earlier
            if retained := self._retained(self._earlier, start, base["params"]):
                base["start"] = retained
            for name in base.keys() - {"params", "norms"}:
                base[name] = jax.tree.map(
                    lambda x, s: x.astype(s.dtype), base[name], self.base_shapes[name]
                )
            base = sharding.place(base, _where(self.base_shapes))
        if self.targets is None:
            # In one program, so that the copies and moments of all weights come into being where
            # they belong, and are never whole on one device.
            make = jax.jit(self._first_state, out_shardings=_where(self.state_shapes))
            return base, make(params, None, start)
        # A LoRA is small: it is made whole and then put in its place.
        state = self._first_state(params, norms, start)
        state = sharding.place(state, _where(self.state_shapes))
        return base, state

    @functools.cached_property
    def jitted(self):
        """The function that XLA compiles."""
        # The state stays where it was: left to the compiler, it may come back placed in another
        # way, for which the second step would be compiled anew.
        where = jax.tree.flatten((_where(self.state_shapes), self._everywhere))
        options = sharding.compiler_options(self._mesh)
        return shared_step(
            make_train_step, OBJECTIVES[self._config.objective], self.method,
            tuple(optimizer_settings(self._config).items()), self._denoiser,
            (tuple(where[0]), where[1]), None if options is None else tuple(options.items()),
        )

    def __call__(
        self, state: TrainState, base: Tree | None, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update. The arrays of `state` are freed."""
        return self._compiled.get(_signature(batch), self.jitted)(state, base, batch)

    def with_earlier(self, earlier: Tree) -> Step:
        """The same step with arrays where only shapes of config.base_lora were known."""
        step = copy.copy(self)
        step._earlier = earlier
        return step

    def with_remat(self, policy: str) -> Step:
        """The same step, whose layers keep what another policy says."""
        other = copy.copy(self)
        network = self._denoiser.network.clone(remat=policy)
        other._denoiser = dataclasses.replace(self._denoiser, network=network)
        other._compiled = {}
        other.__dict__.pop("jitted", None)
        return other

    def compile(self, bucket: Bucket) -> jax.stages.Compiled:
        """The program for the batches of a bucket, which calls with such batches then run."""
        shapes = self.shapes(bucket)
        leaves, structure = jax.tree.flatten((shapes.state, shapes.base, shapes.batch))
        compiled = shared_program(self.jitted, tuple(leaves), structure)
        self._compiled[_signature(shapes.batch)] = compiled
        return compiled

    def lower(self, bucket: Bucket) -> jax.stages.Lowered:
        """The step for the batches of a bucket, ready to be compiled; nothing is computed."""
        shapes = self.shapes(bucket)
        return self.jitted.lower(shapes.state, shapes.base, shapes.batch)

    def shapes(self, bucket: Bucket) -> Shapes:
        """All arguments of the step for the batches of a bucket.

        Raises:
            ValueError: A bucket whose sides the network cannot take, or a schedule that does not
                have so many steps.
        """
        config = self._config
        latent = (config.batch_size, *self._denoiser.latent_shape(bucket.height, bucket.width))
        sigmas = flow.make_sigmas(config.schedule, config.num_steps, config.shift or 1.0)

        def array(*shape, dtype=jnp.float32, where=self._rows):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        def context(role: str, length: int) -> Context:
            B, D = config.batch_size, self._denoiser.text_width
            M = self.reference_tokens(role, bucket)
            return Context(
                array(B, length, D, dtype=jnp.dtype(config.dtype)), array(B, length, dtype=bool),
                array(B, M, latent[-1]) if M else None,
                array(B, M, 4, dtype=jnp.int32) if M else None,
            )

        return Shapes(self.state_shapes, self.base_shapes, Batch(
            noise=array(*latent),
            student_ctx=context(contexts.STUDENT, config.text_tokens),
            teacher_ctx=context(contexts.TEACHER, config.teacher_tokens)
            if needs_teacher(config) else None,
            sigmas=array(*sigmas.shape, where=self._everywhere),
            latents=array(*latent) if needs_targets(config) else None,
            sigma=array(config.batch_size) if self._draws_sigma else None,
            kept=array(config.batch_size, dtype=bool) if self.method.keeps else None,
        ))

    def reference_tokens(self, role: str, bucket: Bucket) -> int:
        """How many tokens the references are that a role sees beside a row of a bucket."""
        h, w, _ = self._denoiser.latent_shape(bucket.height, bucket.width)  # of each, too
        recipe = contexts.RECIPES[self._config.recipe]
        return len(recipe.shown(role, bucket.references)) * h * w

    @property
    def _draws_sigma(self) -> bool:
        """Whether the objective reads a noise level per row instead of the rollout's schedule."""
        return self._config.objective == "sft"

    @functools.cached_property
    def rows(self) -> list[int]:
        return sharding.local_rows(self._rows, self._config.batch_size)

    @functools.cached_property
    def _draws(self):
        size = self._config.batch_size

        @functools.partial(
            jax.jit, static_argnums=(2, 3), out_shardings=(self._rows, self._rows)
        )
        def draws(rng, number, shape, shift):
            rng = jax.random.wrap_key_data(rng)
            return draw_noise(rng, number, shape), draw_sigma(rng, number, size, shift)

        return draws

    def batch(
        self, number: int, rng: jax.Array, bucket: Bucket, shift: float,
        features: tuple[Context, Context | None, np.ndarray | None],
        kept: np.ndarray | None = None,
    ) -> Batch:
        """The batch of an update, on the devices.

        Noise and noise levels follow from `number` and `rng` alone, so that a run that resumes
        draws what it would have drawn.

        Args:
            number: Updates done before.
            rng: Of the state.
            bucket: Of the batch's rows.
            shift: Of the schedule: the config's, or the model's for this bucket.
            features: Of this process's `rows`, as `BatchFeatures.batch` gives them: contexts of
                student and teacher, and the targets' latents.
            kept: bool, which of these `rows` only keep the student; None without `method.keeps`.
        """
        config = self._config
        (student_ctx, teacher_ctx, latents), kept = sharding.place_rows(
            self._rows, config.batch_size, self.rows, (features, kept)
        )
        if shift not in self._sigmas:
            sigmas = flow.make_sigmas(config.schedule, config.num_steps, shift)
            self._sigmas[shift] = sharding.place(sigmas, self._everywhere)
        shape = self._denoiser.latent_shape(bucket.height, bucket.width)
        noise, sigma = self._draws(rng, number, (config.batch_size, *shape), shift)
        return Batch(
            noise, student_ctx, teacher_ctx, self._sigmas[shift], latents,
            sigma if self._draws_sigma else None, kept,
        )


# Of one step alone: programs that are kept take memory of the devices.
@functools.lru_cache(maxsize=1)
def shared_step(
    make: Callable[..., Any], objective: Callable[..., Any], method: Method,
    settings: tuple[tuple[str, Any], ...], denoiser: Denoiser, where: tuple[Any, Any],
    options: tuple[tuple[str, Any], ...] | None,
):
    """The jitted function of all steps for which these are equal.

    With it the next run of a process, such as a later task of a sequence, neither traces nor
    compiles again what the last one did; but where remat=auto had to try several policies, the
    next run tries them again.

    Args:
        make: `make_train_step`.
        objective: Of OBJECTIVES.
        method, settings: Of the config; settings are `optimizer_settings`, as items.
        denoiser: The network on its mesh.
        where: Shardings of the new state and of the metrics, flattened.
        options: For the compiler, as items.
    """
    leaves, structure = where
    return jax.jit(
        make(method, make_optimizer(**dict(settings)), objective(method, denoiser.velocity)),
        # The new state takes the memory of the old one; two of them may not fit. The base is not
        # donated: the next step needs it again.
        donate_argnums=0,
        out_shardings=jax.tree.unflatten(structure, leaves),
        compiler_options=None if options is None else dict(options),
    )


@functools.lru_cache(maxsize=1)
def shared_program(
    step: Any, shapes: tuple[jax.ShapeDtypeStruct, ...], structure: Any
) -> jax.stages.Compiled:
    """The program of a `shared_step` for arguments of these shapes, flattened."""
    return step.lower(*jax.tree.unflatten(structure, shapes)).compile()


def _signature(batch: Batch) -> Any:
    """What tells programs of a step apart: shapes and dtypes of a batch."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((x.shape, x.dtype) for x in leaves)


def _jitted(f: Callable[..., Tree], *args: Tree, where: Any = None) -> Tree:
    """f in one program, as arrays that several processes hold need it."""
    return jax.jit(f, out_shardings=where)(*args)


def _where(shapes: Tree) -> Any:
    return jax.tree.map(lambda s: s.sharding, shapes)
