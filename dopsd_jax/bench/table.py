"""Measurements -> a table: time, memory, utilisation, and the ratio to the torch loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from dopsd_jax.bench.case import RANK, STEPS, Case, Measured
from dopsd_jax.bench.ours import denoiser_of, step_of
from dopsd_jax.planning import flops

# Dense bfloat16 FLOP/s, from the makers' data sheets, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
         "4090": 165e12, "B200": 2250e12}


@dataclasses.dataclass(frozen=True)
class Result:
    """A program on a case: what was measured, or why nothing was."""

    program: str
    case: Case
    found: Measured | str


@functools.cache
def useful_flops(case: Case) -> float:
    """Of one update, without what is computed a second time; the same for every program."""
    denoiser, step = denoiser_of(case), step_of(case)
    image = (case.side // denoiser.pixel_multiple) ** 2
    student, teacher = (
        flops.forward(
            denoiser, step.base_shapes["params"], step.state_shapes.student, image=image, text=text
        )
        for text in (case.student_tokens, case.teacher_tokens)
    )
    return case.batch * flops.train_step(student, teacher, STEPS, "lora", "none").useful


def utilisation(case: Case, found: Measured) -> float | None:
    """Model FLOP utilisation; None on a device whose peak is not known."""
    peak = next((p for name, p in PEAKS.items() if name in found.device), None)
    return None if peak is None else useful_flops(case) / found.seconds / peak


def as_markdown(results: Sequence[Result]) -> str:
    """A row per measurement. "Times torch" is the torch loop's time over this one's, same case."""
    def same(case: Case) -> tuple[int, ...]:
        return case.side, case.batch, case.student_tokens, case.teacher_tokens

    torch = {
        same(r.case): r.found.seconds for r in results
        if r.program == "torch" and isinstance(r.found, Measured)
    }
    devices = sorted({r.found.device for r in results if isinstance(r.found, Measured)})
    lines = [
        f"{', '.join(devices) or 'no device'}; S = {STEPS}, rank {RANK}; "
        f"{results[0].case.model}, {useful_flops(results[0].case) / 1e12:.4g} TFLOP per update of "
        f"{results[0].case.batch} at {results[0].case.side} px.", "",
        "| side | batch | tokens | program | remat | s per update | slowest | images/s | "
        "times torch | GiB | MFU | first update, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        side, batch, *tokens = same(r.case)
        policy = "checkpointing" if r.program.startswith("torch") else r.case.remat
        base = "" if r.case.base_dtype == "dtype" else f", {r.case.base_dtype} base"
        head = f"| {side} | {batch} | {tokens[0]}, {tokens[1]} | {r.program}{base} | {policy} |"
        if isinstance(r.found, str):
            lines.append(f"{head} {r.found} |" + " |" * 6)
            continue
        other = torch.get(same(r.case))
        used = utilisation(r.case, r.found)
        lines.append(
            f"{head} {r.found.seconds:.3f} | {r.found.slowest:.3f} | "
            f"{r.case.batch / r.found.seconds:.3g} | "
            f"{'' if other is None else format(other / r.found.seconds, '.2f')} | "
            f"{r.found.peak_bytes / 2**30:.1f} | {'' if used is None else format(used, '.1%')} | "
            f"{r.found.first_seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"
