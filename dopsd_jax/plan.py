"""Command: what will this run need, does it fit, and what should it cost; no accelerator needed.

    python -m dopsd_jax.plan --config configs/z_image_turbo_lora.py --topology v5e:4x4
    python -m dopsd_jax.plan --config .. --topology v5e:4x4,v6e:4x4 --sweep
    python -m dopsd_jax.plan --config .. --device h100,4090

The train step is compiled by the real TPU or GPU compiler, from shapes alone. Exit status: 0 fits,
2 does not, 1 wrong input. Times are estimates, never measurements.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
import time

import jax
from absl import flags
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict, config_flags

from dopsd_jax.core import cli, sharding
from dopsd_jax.core.log import log
from dopsd_jax.method import contexts
from dopsd_jax.planning import compiler, flops, hlo, lowering
from dopsd_jax.planning.chips import GIB, Chip, chip_of, count_chips
from dopsd_jax.planning.gpus import GPUS
from dopsd_jax.run import remat
from dopsd_jax.run.config import check_values
from dopsd_jax.run.keys import AUTO
from dopsd_jax.run.step import Step
from dopsd_jax.weights.pipeline import transformer_shapes

FLAGS = flags.FLAGS
DOES_NOT_FIT = 2  # exit status
HEADROOM = 0.10  # of the memory, below which a plan warns
SWEEP_BATCHES = (1, 2, 4)
SWEEP_REMAT = ("full", "attention", "matmuls", "linears")
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
        total: Bytes per chip of the whole program and of preview_model; None where the compiler
            did not say.
        largest: (bytes, arrays), largest first.
        collectives: One step's, each with how often it runs.
        flops: Of one picture's step.
        cycles: The compiler's estimate of one step; 0: not asked for.
        seconds_compiling: That planning took.
        text: Scheduled HLO; empty if it does not fit.
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
    largest: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    collectives: list[hlo.Collective] = dataclasses.field(default_factory=list)
    cycles: int = 0
    seconds_compiling: float = 0.0
    text: str = ""

    @property
    def fits(self) -> bool:
        return bool(self.text) and self.total <= self.limit

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
    sizes = sharding.mesh_sizes(chips, **config.mesh.to_dict())
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


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
    config: ConfigDict, topology: str, *, batch: int = 0, full: bool = False
) -> Plan:
    """Compiles a config's step for a TPU topology or a GPU and reads what it needs.

    With remat=auto policies are compiled as a run would, until one fits.

    Args:
        config: Of a run; config.model may be empty, which means Z-Image-Turbo.
        topology: Such as "v5e:4x4", or a GPU such as "h100".
        batch: Pictures per chip, see `with_batch`; 0: as configured.
        full: Build the executable, which takes many minutes; the estimate of time then rests on
            the compiler's own cycles.

    Raises:
        ValueError: An unknown topology or a mesh that does not fit it, an impossible value, no
            compiler for it, or one that refuses.
    """
    chip, chips = chip_of(topology), count_chips(topology)
    if chip.target and not compiler.has_gpu_compiler():
        raise ValueError(NEEDS_CUDA)
    if not chip.target and not compiler.has_tpu_compiler():
        raise ValueError(NEEDS_LIBTPU)
    check_values(config, besides=("model", "vlm", "data"))
    config, batch = with_batch(config, chips, batch)
    for policy in policies(config):
        found = _plan(with_remat(config, policy), topology, chip, chips, batch, full)
        if found.fits and (found.total <= remat.SHARE * chip.memory or config.remat != AUTO):
            break
        log.info("%s: remat %s does not fit", topology, policy)
    return found


def _plan(
    config: ConfigDict, topology: str, chip: Chip, chips: int, batch: float, full: bool
) -> Plan:
    step = lowering.step_of(config, mesh_of(config, chips))
    shapes = step.shapes(lowering.planned_bucket(config))
    found = Plan(
        topology, chips, batch, config.remat, chip.memory,
        lowering.bytes_per_device(shapes.base or {}), lowering.bytes_per_device(shapes.state),
        step_flops(config, step), lowering.preview_bytes(config, shapes),
    )
    asked = {"config": config.to_dict(), "topology": topology, "full": full}
    kind = "GPU" if chip.target else "TPU"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asked, file)
        file.flush()
        try:
            command = [sys.executable, "-m", lowering.__name__, file.name]
            if chip.target:
                dump = compiler.compile_for_gpu(command)
            else:
                dump = compiler.compile_in_child(command, "train_step", full=full)
        except compiler.DoesNotFit as e:
            found.total = None if e.needed is None else e.needed + found.preview
            return found
        except RuntimeError as e:
            raise ValueError(
                f"{topology}: the {kind} compiler gave up; are there such chips, and does the step "
                f"run elsewhere?\n  {e}"
            ) from e
    found.total, found.largest = dump.memory.total + found.preview, dump.memory.largest
    found.collectives = hlo.collectives(hlo.parse(dump.text))
    found.cycles, found.seconds_compiling, found.text = dump.cycles, dump.seconds, dump.text
    return found


def report(config: ConfigDict, p: Plan) -> str:
    """What `plan` found, for a reader."""
    compiles = len(lowering.buckets_of(config))
    lines = [
        f"{p.topology}: {p.chips} chips, {p.batch:g} pictures per update and chip, remat {p.remat}",
    ]
    if not p.fits:
        needs = "more" if p.total is None else f"{p.total / GIB:.2f} GiB"
        lines.append(f"DOES NOT FIT: needs {needs}, a chip has {p.limit / GIB:.2f} GiB")
        return "\n".join([*lines, *_memory_lines(p)])
    left = 1 - p.total / p.limit
    lines.append(f"FITS: {p.total / GIB:.2f} of {p.limit / GIB:.2f} GiB per chip"
                 + (f"; only {left:.0%} is left" if left < HEADROOM else ""))
    lines += _memory_lines(p)
    if p.collectives:
        lines.append("collectives per step and chip:")
    for op in hlo.COLLECTIVES:
        if moved := p.moved(op):
            share = 1 - p.moved(op, exposed=True) / moved
            lines.append(f"  {op:19} {moved / 1e9:8.2f} GB, {share:.0%} overlapped")
    lines.append(f"compiles per run     up to {compiles} (one per bucket that has pictures)")
    lines.append(f"FLOPs per picture    {p.flops.useful / 1e12:.0f} T useful, "
                 f"{p.flops.computed / 1e12:.0f} T computed")
    lines += [f"  {name:19} {n / 1e12:8.1f} T" for name, n in p.flops.parts.items()]
    hours = p.seconds * config.num_train_steps / 3600
    lines += [
        f"estimated            {p.seconds:.2f} s per step, {p.images_per_second:.2f} images/s, "
        f"model FLOP utilisation {p.mfu:.0%}",
        f"                     {hours:.1f} hours for {config.num_train_steps} steps",
        *rests_on(p),
        f"planned in {p.seconds_compiling:.0f} s",
    ]
    return "\n".join(lines)


def _memory_lines(p: Plan) -> list[str]:
    lines = [f"  weights            {p.weights / GIB:8.2f} GiB",
             f"  trained state      {p.state / GIB:8.2f} GiB", *_preview_line(p.preview)]
    if p.text:
        temporaries = p.total - p.weights - p.state - p.preview
        lines.append(f"  temporaries        {temporaries / GIB:8.2f} GiB")
    if p.largest:
        lines.append("largest buffers:")
        lines += [f"  {size / GIB:8.2f} GiB  {shapes[:60]}" for size, shapes in p.largest[:5]]
    return lines


def _preview_line(size: int) -> list[str]:
    return [f"  preview_model      {size / GIB:8.2f} GiB"] if size else []


def rests_on(p: Plan) -> list[str]:
    """What an estimate of time rests on, and what bounds it."""
    chip = chip_of(p.topology)
    linear = ("the compiler's own cycles" if p.cycles else
              f"{chip.linear:.0%} of peak in linear layers")
    bound = "links" if p.link_seconds > p.compute_seconds else "compute"
    return [
        f"  rests on: {linear}; {chip.attention:.0%} in attention kernels ({chip.rests}); links at "
        "their data sheet's rate",
        f"  bound by {bound}: {p.compute_seconds:.2f} s compute, {p.link_seconds:.2f} s overlapped "
        f"and {p.exposed_seconds:.2f} s exposed collectives",
    ]


def sweep(config: ConfigDict, topologies: list[str]) -> list[Plan]:
    """Every topology with SWEEP_BATCHES and SWEEP_REMAT, best first, what does not fit last."""
    found, began = [], time.monotonic()
    cases = list(itertools.product(topologies, SWEEP_BATCHES, SWEEP_REMAT))
    for done, (topology, batch, policy) in enumerate(cases, 1):
        found.append(plan(with_remat(config, policy), topology, batch=batch))
        left = (time.monotonic() - began) / done * (len(cases) - done)
        log.info("%d of %d, %.0f s left: %s batch %d %s, %s", done, len(cases), left, topology,
                 batch, policy, "fits" if found[-1].fits else "does not fit")
    return sorted(found, key=lambda p: (not p.fits, -p.mfu if p.fits else p.total or 0))


def table(plans: list[Plan]) -> str:
    """One line per plan."""
    lines = [f"{'topology':10} {'batch':>5} {'remat':10} {'GiB':>6} {'of':>6} {'s/step':>7} "
             f"{'img/s':>6} {'MFU':>4}"]
    for p in plans:
        size = "?" if p.total is None else f"{p.total / GIB:.2f}"
        line = f"{p.topology:10} {p.batch:5g} {p.remat:10} {size:>6} {p.limit / GIB:6.2f} "
        lines.append(line + (f"{p.seconds:7.2f} {p.images_per_second:6.2f} {p.mfu:4.0%}"
                             if p.fits else "does not fit"))
    return "\n".join(lines)


def plan_here(config: ConfigDict, batch: int = 0) -> str:
    """The same for this machine's devices: memory by XLA's analysis, and FLOPs."""
    devices = jax.devices()
    check_values(config, besides=("model", "vlm", "data"))
    config, batch = with_batch(config, len(devices), batch)
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    for policy in policies(config):
        config = with_remat(config, policy)
        lowered, shapes = lowering.lower(config, mesh)
        memory = lowered.compile().memory_analysis()
        preview = lowering.preview_bytes(config, shapes)
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + preview
        if limit is None or total <= limit:
            break
    fits = "" if limit is None else ("FITS: " if total <= limit else "DOES NOT FIT: ")
    of = "" if limit is None else f" of {limit / GIB:.2f}"
    step = step_flops(config, lowering.step_of(config, mesh))
    return "\n".join([
        f"{len(devices)} x {devices[0].device_kind}, {batch:g} pictures per device, "
        f"remat {config.remat}",
        f"{fits}{total / GIB:.2f}{of} GiB per device",
        f"  weights            {lowering.bytes_per_device(shapes.base or {}) / GIB:8.2f} GiB",
        f"  trained state      {lowering.bytes_per_device(shapes.state) / GIB:8.2f} GiB",
        *_preview_line(preview),
        f"  temporaries        {memory.temp_size_in_bytes / GIB:8.2f} GiB",
        f"FLOPs per picture    {step.useful / 1e12:.3g} T useful, {step.computed / 1e12:.3g} T "
        "computed",
    ])


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    flags.DEFINE_list("topology", [], "TPU chips, such as v5e:4x4; several for --sweep. Default: "
                      "this machine's devices.")
    flags.DEFINE_list("device", [], f"One GPU each: {', '.join(GPUS)}.")
    flags.DEFINE_integer("batch", 0, "Pictures per chip (or group of chips of "
                         "mesh.tensor); default: as configured, or 1.",
                         lower_bound=0)
    flags.DEFINE_bool("sweep", False, "A table over topologies, batches and remat policies.")
    flags.DEFINE_bool("full", False, "Build the executable: many minutes, a better estimate.")


def main() -> None:
    config = FLAGS.config
    if config is None:
        raise ValueError("--config is needed, such as --config configs/z_image_turbo_lora.py")
    targets = [*FLAGS.topology, *FLAGS.device]
    if wrong := [name for name in FLAGS.device if name not in GPUS]:
        raise ValueError(f"--device: expected some of {', '.join(GPUS)}, got {', '.join(wrong)}")
    if FLAGS.sweep and (not targets or FLAGS.batch or FLAGS.full):
        raise ValueError("--sweep: expected --topology or --device, and neither --batch nor --full:"
                         f" it goes through batches {SWEEP_BATCHES} by short plans")
    if FLAGS.full and (not FLAGS.topology or FLAGS.device):
        raise ValueError("--full: expected --topology alone with it: it is about the TPU compiler")
    if not targets:
        text = plan_here(config, FLAGS.batch)
        print(text)
        fits = "DOES NOT FIT" not in text
    elif FLAGS.sweep:
        plans = sweep(config, targets)
        print(table(plans))
        fits = any(p.fits for p in plans)
    else:
        plans = [plan(config, t, batch=FLAGS.batch, full=FLAGS.full) for t in targets]
        if len(plans) > 1:
            print(table(plans) + "\n")
        print("\n\n".join(report(config, p) for p in plans))
        fits = all(p.fits for p in plans)
    if not fits:
        raise SystemExit(DOES_NOT_FIT)


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)
