"""A plan: what a config's train step and the other phases of its run need on given chips."""

from __future__ import annotations

import dataclasses
import math
import time

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from dopsd_jax.core import sharding
from dopsd_jax.core.log import log
from dopsd_jax.method import contexts
from dopsd_jax.models.quantization import quantised_as
from dopsd_jax.planning import compiler, flops, hlo, lowering, phases
from dopsd_jax.planning.chips import GIB, Chip, chip_of, count_chips
from dopsd_jax.planning.phases import Phase
from dopsd_jax.run import remat
from dopsd_jax.run.config import check_values
from dopsd_jax.run.keys import AUTO
from dopsd_jax.run.step import Step
from dopsd_jax.weights.shapes import transformer_shapes

NEEDS_CUDA = (
    "planning for a GPU needs JAX's CUDA plugin, which compiles on any Linux machine: pip install "
    "-e '.[cuda]'"
)
NEEDS_LIBTPU = (
    "planning for TPU needs its compiler, the package libtpu: pip install -e '.[tpu]' (it plans on "
    "any Linux machine); without --topology this machine's devices are planned for"
)


@dataclasses.dataclass
class Plan:
    """What was found out about a config on a topology.

    Attributes:
        topology, chips, batch: What was asked; batch is pictures of an update per chip, less
            than one where chips share a picture (mesh.tensor).
        remat: Policy that was asked for or found.
        limit: Bytes that a chip has.
        weights, state: Bytes per chip of the frozen base, and of all that trains.
        preview: Bytes per chip of preview_model, which stays beside them.
        total: Bytes per chip of the train step's program and of preview_model; None where the
            compiler did not say.
        phases: What every phase of the run needs, where that was asked for.
        largest: (bytes, arrays), largest first.
        collectives: One step's, each with how often it runs.
        flops: Of one picture's step.
        cycles: The compiler's estimate of one step; 0: not asked for.
        seconds_compiling: That planning took.
        text: Scheduled HLO; empty if it does not fit.
        base_dtype: In which the frozen weights are quantised; "" where they are not.
    """

    topology: str
    chips: int
    batch: float
    remat: str
    limit: float
    weights: int
    state: int
    flops: flops.Step
    preview: int = 0
    total: float | None = None
    phases: list[Phase] = dataclasses.field(default_factory=list)
    largest: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    collectives: list[hlo.Collective] = dataclasses.field(default_factory=list)
    cycles: int = 0
    seconds_compiling: float = 0.0
    text: str = ""
    base_dtype: str = ""

    @property
    def fits(self) -> bool:
        return bool(self.text) and max(self.total, self.needed) <= self.limit

    @property
    def peak(self) -> Phase | None:
        """The phase that needs most; None if they were not asked for."""
        return max(self.phases, key=lambda phase: phase.total, default=None)

    @property
    def needed(self) -> float:
        """Bytes per chip of the whole run, or of its train step if nothing else was asked for."""
        if self.phases:
            return self.peak.total
        return math.inf if self.total is None else self.total

    def moved(self, op: str | None = None, *, exposed: bool = False) -> int:
        """Bytes per step of a collective, or of all; `exposed`: those nothing overlaps."""
        return sum(c.bytes * c.times for c in self.collectives
                   if op in (None, c.op) and not (exposed and c.overlapped))

    @property
    def seconds(self) -> float:
        """Of one step, estimated: see `rests_on`."""
        return max(self.compute_seconds, self.link_seconds) + self.exposed_seconds

    @property
    def compute_seconds(self) -> float:
        chip, attention = chip_of(self.topology), self.flops.attention * self.batch
        if self.cycles:
            linear = self.cycles / chip.clock
        else:
            linear = (self.flops.computed * self.batch - attention) / (chip.peak * chip.linear)
        return linear + attention / (chip.peak * chip.attention)

    @property
    def link_seconds(self) -> float:
        return (self.moved() - self.moved(exposed=True)) / chip_of(self.topology).links

    @property
    def exposed_seconds(self) -> float:
        return self.moved(exposed=True) / chip_of(self.topology).links

    @property
    def images_per_second(self) -> float:
        return self.batch * self.chips / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the peak that useful FLOPs, none of them recomputed, would reach."""
        return self.flops.useful * self.batch / self.seconds / chip_of(self.topology).peak


def mesh_of(config: ConfigDict, chips: int) -> AbstractMesh:
    """The config's mesh over so many chips, which need not be there.

    Raises:
        ValueError: Sizes that do not multiply to the number of chips.
    """
    return lowering.abstract_mesh(*sharding.mesh_sizes(chips, **config.mesh.to_dict()))


def with_batch(config: ConfigDict, chips: int, batch: int) -> tuple[ConfigDict, float]:
    """The config with `batch` pictures for every chip, or group of chips that share a picture
    (mesh.tensor), and how many that are per chip; 0: as configured, or, if that does not divide,
    the least that does.

    Raises:
        ValueError: A mesh that does not fit the chips, or a batch that accumulation does not.
    """
    config = config.copy_and_resolve_references()
    mesh = mesh_of(config, chips)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % config.accumulation:
        raise ValueError(
            f"--batch: expected a multiple of accumulation = {config.accumulation}, got {batch}"
        )
    with config.unlocked():
        if batch:
            config.batch_size = batch * rows
        elif config.batch_size % (rows * config.accumulation):
            config.batch_size = rows * config.accumulation
    return config, config.batch_size / chips


def step_flops(config: ConfigDict, step: Step) -> flops.Step:
    """FLOPs of one picture's step, counted."""
    denoiser = lowering.denoiser_of(config)
    params = transformer_shapes(denoiser.network)
    trained = step.state_shapes.student if config.trainable == "lora" else None
    bucket = lowering.planned_bucket(config)
    side = denoiser.pixel_multiple
    image = (bucket.height // side) * (bucket.width // side)
    student, teacher = (
        flops.forward(
            denoiser, params, trained, image=image, text=text,
            references=step.reference_tokens(role, bucket),
        )
        for role, text in (
            (contexts.STUDENT, config.text_tokens), (contexts.TEACHER, config.teacher_tokens)
        )
    )
    retained = None
    if step.method.retains:
        retained = flops.forward(denoiser, params, None, image=image, text=config.text_tokens)
    return flops.train_step(
        student, teacher if config.objective == "dopsd" else None,
        config.num_steps if config.objective == "dopsd" else 1, config.trainable, config.remat,
        retained,
    )


def policies(config: ConfigDict) -> tuple[str, ...]:
    """What a run of this config tries, in this order; see run/remat.py."""
    return remat.ORDER if config.remat == AUTO else (config.remat,)


def with_remat(config: ConfigDict, policy: str) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.remat = policy
    return config


def plan(
    config: ConfigDict, topology: str, *, batch: int = 0, full: bool = False,
    all_phases: bool = False,
) -> Plan:
    """Compiles a config's step for a TPU topology or a GPU and reads what it needs.

    With remat=auto policies are compiled as a run would, until one fits.

    Args:
        config: Of a run; config.model may be empty, which means config.published.
        topology: Such as "v5e:4x4", or a GPU such as "h100".
        batch: Pictures per chip, see `with_batch`; 0: as configured.
        full: Build the executable, which takes many minutes; the estimate of time then rests on
            the compiler's own cycles.
        all_phases: Compile the programs of the run's other phases too.

    Raises:
        ValueError: An unknown topology or a mesh that does not fit it, an impossible value, no
            compiler for it, or one that refuses.
    """
    chip, chips = checked(config, topology), count_chips(topology)
    config, batch = with_batch(config, chips, batch)
    arrays = {}
    if all_phases:
        arrays = phases.arrays(with_remat(config, remat.ORDER[-1]), mesh_of(config, chips))
    for policy in policies(config):
        found = _plan(with_remat(config, policy), topology, chip, chips, batch, full)
        beside = arrays[phases.TRAIN].beside if arrays else found.preview
        whole = math.inf if found.total is None else found.total - found.preview + beside
        if found.fits and (whole <= remat.SHARE * chip.memory or config.remat != AUTO):
            break
        log.info("%s: remat %s does not fit", topology, policy)
    for name, known in arrays.items():
        if name == phases.TRAIN:
            found.phases.append(Phase(name, whole - beside, beside))
        else:
            found.phases.append(
                measure(with_remat(config, found.remat), topology, name, known.beside)
            )
    return found


def checked(config: ConfigDict, topology: str) -> Chip:
    """The chip of a topology, once there is a compiler for it and the config's values are possible.

    Raises:
        ValueError: See `plan`.
    """
    chip = chip_of(topology)
    if chip.target and not compiler.has_gpu_compiler():
        raise ValueError(NEEDS_CUDA)
    if not chip.target and not compiler.has_tpu_compiler():
        raise ValueError(NEEDS_LIBTPU)
    check_values(config, besides=("model", "vlm", "data"))
    return chip


def measure(config: ConfigDict, topology: str, name: str, beside: int) -> Phase:
    """What a phase needs, by the compiler.

    Args:
        config: Of a run, with a policy of rematerialisation and the batch that is planned for.
        topology: See `plan`.
        name: A key of phases.WORDS.
        beside: Bytes per chip, see `phases.arrays`.

    Raises:
        ValueError: The compiler refuses it for another reason than memory.
    """
    began = time.monotonic()
    try:
        program = phases.compile_for(config, topology, name).memory.total
    except compiler.DoesNotFit as e:
        program = e.needed
    found = Phase(name, math.inf if program is None else program, beside)
    log.info("%s: %s needs %s GiB (%.0f s)", topology, phases.WORDS[name], gib(found.total),
             time.monotonic() - began)
    return found


def gib(size: float | None) -> str:
    """Bytes in GiB, for a table."""
    return "?" if size is None or math.isinf(size) else f"{size / GIB:.2f}"


def _plan(
    config: ConfigDict, topology: str, chip: Chip, chips: int, batch: float, full: bool
) -> Plan:
    step = lowering.step_of(config, mesh_of(config, chips))
    shapes = step.shapes(lowering.planned_bucket(config))
    found = Plan(
        topology, chips, batch, config.remat, chip.memory,
        lowering.bytes_per_device(shapes.base or {}), lowering.bytes_per_device(shapes.state),
        step_flops(config, step), lowering.preview_bytes(config, shapes),
        base_dtype=quantised_as("base_dtype", config.base_dtype),
    )
    try:
        dump = phases.compile_for(config, topology, phases.TRAIN, full=full)
    except compiler.DoesNotFit as e:
        found.total = None if e.needed is None else e.needed + found.preview
        return found
    found.total, found.largest = dump.memory.total + found.preview, dump.memory.largest
    found.collectives = hlo.collectives(hlo.parse(dump.text))
    found.cycles, found.seconds_compiling, found.text = dump.cycles, dump.seconds, dump.text
    return found
