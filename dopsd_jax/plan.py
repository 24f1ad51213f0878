"""Command: what will this run need, does it fit, and what should it cost; no accelerator needed.

    python -m dopsd_jax.plan --config configs/z_image_turbo_lora.py --topology v5e:4x4
    python -m dopsd_jax.plan --config .. --topology v5e:4x4,v6e:4x4 --sweep
    python -m dopsd_jax.plan --config .. --device h100,4090

The train step is compiled by the real TPU or GPU compiler, from shapes alone. Exit status: 0 fits,
2 does not, 1 wrong input. Times are estimates, never measurements.
"""

from __future__ import annotations

import itertools
import time

import jax
from absl import flags
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
    mesh_of,
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
