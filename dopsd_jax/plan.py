"""Command: what will this run need, does it fit, and what should it cost; no accelerator needed.

    python -m dopsd_jax.plan --config configs/z_image_turbo_lora.py --topology v5e:4x4
    python -m dopsd_jax.plan --config .. --topology v5e:4x4,v6e:4x4 --sweep
    python -m dopsd_jax.plan --config .. --device h100,4090 --phases
    python -m dopsd_jax.plan --config .. --fit 16

The train step, and with --phases or --fit every other program of a run, is compiled by the real TPU
or GPU compiler, from shapes alone. Exit status: 0 fits, 2 does not, 1 wrong input. Times are
estimates, never measurements.
"""

from __future__ import annotations

import itertools
import math
import time

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from dopsd_jax.core import cli, sharding
from dopsd_jax.core.log import log
from dopsd_jax.core.memory import memory_of
from dopsd_jax.planning import fit, hlo, lowering, phases
from dopsd_jax.planning.chips import GIB, chip_of
from dopsd_jax.planning.gpus import GPUS
from dopsd_jax.planning.phases import Phase
from dopsd_jax.planning.plans import (
    Plan,
    gib,
    plan,
    policies,
    step_flops,
    with_batch,
    with_remat,
)
from dopsd_jax.run import remat
from dopsd_jax.run.config import check_values
from dopsd_jax.run.keys import AUTO

FLAGS = flags.FLAGS
DOES_NOT_FIT = 2  # exit status
HEADROOM = 0.10  # of the memory, below which a plan warns
SWEEP_BATCHES = (1, 2, 4)
SWEEP_REMAT = ("full", "attention", "matmuls", "linears")


def report(config: ConfigDict, p: Plan) -> str:
    """What `plan` found, for a reader."""
    compiles = len(lowering.buckets_of(config))
    lines = [
        f"{p.topology}: {p.chips} chips, {p.batch:g} pictures per update and chip, remat {p.remat}",
    ]
    most = f", most where the run is to {phases.WORDS[p.peak.name]}" if p.phases else ""
    if not p.fits:
        needs = "more" if math.isinf(p.needed) else f"{gib(p.needed)} GiB"
        lines.append(f"DOES NOT FIT: needs {needs}, a chip has {p.limit / GIB:.2f} GiB{most}")
        return "\n".join([*lines, *_phase_lines(p.phases), *_memory_lines(p)])
    left = 1 - p.needed / p.limit
    lines.append(f"FITS: {gib(p.needed)} of {p.limit / GIB:.2f} GiB per chip{most}"
                 + (f"; only {left:.0%} is left" if left < HEADROOM else ""))
    lines += [*_phase_lines(p.phases), *_memory_lines(p)]
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


def _phase_lines(found: list[Phase]) -> list[str]:
    """What every phase of a run needs, in their order."""
    if not found:
        return []
    lines = [f"  {phases.WORDS[p.name]:32} {gib(p.total):>8} GiB: program {gib(p.program)}, "
             f"beside it {gib(p.beside)}" for p in found]
    return ["phases of the run:", *lines, "the train step's program:"]


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
    if p.base_dtype and not p.cycles:
        linear += f", of bfloat16 weights: {p.base_dtype} takes other times, see --full, memory.md"
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


def plan_here(config: ConfigDict, batch: int = 0, *, all_phases: bool = False) -> str:
    """The same for this machine's devices: memory by XLA's analysis, and FLOPs."""
    devices = jax.devices()
    check_values(config, besides=("model", "vlm", "data"))
    config, batch = with_batch(config, len(devices), batch)
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
    share = remat.SHARE if config.remat == AUTO else 1.0
    for policy in policies(config):
        config = with_remat(config, policy)
        lowered, shapes = lowering.lower(config, mesh)
        counted = memory_of(lowered.compile())
        preview = lowering.preview_bytes(config, shapes)
        total = sum(counted.values()) + preview
        if total <= share * limit:
            break
    found = _phases_here(config, mesh, total - preview) if all_phases else []
    needed = max([total, *(p.total for p in found)])
    fits = "" if math.isinf(limit) else ("FITS: " if needed <= limit else "DOES NOT FIT: ")
    of = "" if math.isinf(limit) else f" of {gib(limit)}"
    step = step_flops(config, lowering.step_of(config, mesh))
    temporaries = sum(counted.values()) - counted["arguments"]
    return "\n".join([
        f"{len(devices)} x {devices[0].device_kind}, {batch:g} pictures per device, "
        f"remat {config.remat}",
        f"{fits}{gib(needed)}{of} GiB per device",
        *_phase_lines(found),
        f"  weights            {lowering.bytes_per_device(shapes.base or {}) / GIB:8.2f} GiB",
        f"  trained state      {lowering.bytes_per_device(shapes.state) / GIB:8.2f} GiB",
        *_preview_line(preview),
        f"  temporaries        {temporaries / GIB:8.2f} GiB",
        f"FLOPs per picture    {step.useful / 1e12:.3g} T useful, {step.computed / 1e12:.3g} T "
        "computed",
    ])


def _phases_here(config: ConfigDict, mesh: Mesh, train: float) -> list[Phase]:
    """Every phase on this machine's devices; `train`: bytes of the train step's program."""
    found = []
    for name, known in phases.arrays(config, mesh).items():
        if name == phases.TRAIN:
            found.append(Phase(name, train, known.beside))
            continue
        program = sum(memory_of(phases.lower(config, mesh, name).compile()).values())
        found.append(Phase(name, program, known.beside))
        log.info("%s: %s GiB", phases.WORDS[name], gib(found[-1].total))
    return found


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
    flags.DEFINE_bool("phases", False, "Compile what comes before and beside the updates too: "
                      "encoding the data, drawing and decoding pictures.")
    flags.DEFINE_string("fit", "", f"Find what fits a card of {', '.join(fit.CLASSES)} GB, or one "
                        "card or chip by its name, such as v5e:1x1.")
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
    if FLAGS["fit"].present:
        if targets or FLAGS.sweep or FLAGS.full:
            raise ValueError("--fit: expected it alone, or with --batch, got --topology, --device, "
                             "--sweep or --full; give the card or chip to --fit itself")
        target = fit.target_of(FLAGS.fit)
        found = fit.find(config, target, FLAGS.batch)
        file = config_flags.get_config_filename(FLAGS["config"])
        print(fit.report(config, found, fit.shipped(file, target)))
        fits = found.changes is not None
    elif not targets:
        text = plan_here(config, FLAGS.batch, all_phases=FLAGS.phases)
        print(text)
        fits = "DOES NOT FIT" not in text
    elif FLAGS.sweep:
        plans = sweep(config, targets)
        print(table(plans))
        fits = any(p.fits for p in plans)
    else:
        plans = [plan(config, t, batch=FLAGS.batch, full=FLAGS.full, all_phases=FLAGS.phases)
                 for t in targets]
        if len(plans) > 1:
            print(table(plans) + "\n")
        print("\n\n".join(report(config, p) for p in plans))
        fits = all(p.fits for p in plans)
    if not fits:
        raise SystemExit(DOES_NOT_FIT)


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)
