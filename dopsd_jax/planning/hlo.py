"""Reads what XLA writes of a compiled program: its scheduled HLO text and its memory report.

Only what a plan asks: how often an instruction runs, what collectives move and whether other work
goes on meanwhile, which arrays exist, the compiler's own estimate of time.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all",
)
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|c64)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch|called)_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name, op: As in the text.
        shape: The text of its result's type.
        rest: Operands and attributes.
    """

    name: str
    op: str
    shape: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a module by name; `entry` is where it begins."""

    computations: dict[str, list[Instruction]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication of a program.

    Attributes:
        op: One of COLLECTIVES.
        bytes: Of its result, on one device.
        times: How often it runs.
        overlapped: Whether it is asynchronous: other work may go on between its start and its end
            (that the schedule has some there is not looked at).
        name: Of its instruction.
    """

    op: str
    bytes: int
    times: int
    overlapped: bool
    name: str


def array_bytes(shape: str) -> int:
    """Bytes of all arrays in the text of a type; of a tuple their sum."""
    return int(sum(
        ITEM_BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
        for kind, dims in _ARRAY.findall(shape)
    ))


def parse(text: str) -> Program:
    """The program of an HLO text.

    Raises:
        ValueError: No entry computation in it.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, lines, name = "", [], None
    for line in text.splitlines():
        if name is None:
            if match := _COMPUTATION.match(line):
                name = match[2]
                entry = name if match[1] else entry
        elif line.rstrip() == "}":  # brackets of a kernel's own text do not stand alone
            computations[name] = [_instruction(text) for text in lines]
            name, lines = None, []
        elif _INSTRUCTION.match(line) or not lines:
            lines.append(line)
        else:  # a long instruction goes on
            lines[-1] += " " + line.strip()
    if not entry:
        raise ValueError("HLO text: expected a line that begins with ENTRY, found none")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    name, rest = (match[1], line[match.end():]) if match else ("", line)
    end = _end_of_type(rest)
    op, _, operands = rest[end:].strip().partition("(")
    return Instruction(name, op, rest[:end], operands)


def _end_of_type(text: str) -> int:
    """Where the type at the begin of an instruction's right side ends: at the first space outside
    of brackets."""
    depth = 0
    for i, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == " " and depth == 0:
            return i
    return len(text)


def executions(program: Program) -> dict[str, int]:
    """Computation -> how often it runs in one run of the program.

    A loop runs as often as the GPU compiler says beside it; the TPU compiler does not, so there it
    is the largest number in its condition: JAX's scans count to it.
    """
    times: dict[str, int] = collections.defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for i in program.computations.get(name, ()):
            if i.op == "while":
                said = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)
                condition = re.search(r"condition=%([\w.\-]+)", i.rest)[1]
                turns = int(said[1]) if said else _turns(program, condition)
                visit(re.search(r"body=%([\w.\-]+)", i.rest)[1], count * turns)
                continue
            if i.op in ("reduce", "reduce-window", "scatter", "sort", "map", "all-reduce",
                        "all-reduce-start", "reduce-scatter", "select-and-scatter"):
                continue  # what they apply runs per element
            called = _CALLED.findall(i.rest)
            for group in _BRANCHES.findall(i.rest):
                called += re.findall(r"%([\w.\-]+)", group)
            for other in called:
                visit(other, count)

    visit(program.entry, 1)
    return dict(times)


def _turns(program: Program, condition: str) -> int:
    numbers = [
        int(match[1]) for i in program.computations[condition] if i.op == "constant"
        if (match := re.match(r"(\d+)\)", i.rest))
    ]
    return max(numbers, default=1)


def collectives(program: Program) -> list[Collective]:
    """Every communication, each once however many instructions carry it.

    On TPU an asynchronous gather appears in the fusions that carry it, one after the other: it
    counts where it starts. One that the compiler could not spread is a plain instruction.
    """
    found = []
    for name, count in executions(program).items():
        instructions = program.computations.get(name, ())
        starts = any('custom_call_target="AsyncCollectiveStart"' in i.rest for i in instructions)
        for i in instructions:
            op = i.op.removesuffix("-start")
            if op not in COLLECTIVES:
                continue
            carried = "chain_id=" in i.rest
            if carried and not starts:
                continue
            size = array_bytes(i.shape)
            if i.op.endswith("-start") and i.shape.startswith("("):  # (operand, result, ..)
                size = max(_sizes(i.shape))
            found.append(Collective(op, size, count, carried or i.op != op, i.name))
    return found


def _sizes(shape: str) -> Iterator[int]:
    return (array_bytes(f"{kind}[{dims}]") for kind, dims in _ARRAY.findall(shape))


def estimated_cycles(program: Program) -> int:
    """The compiler's own estimate for one run, without Pallas kernels and waiting: 0 if the text
    was written before the estimate was made."""
    total = 0
    for name, count in executions(program).items():
        for i in program.computations.get(name, ()):
            if match := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
                total += count * int(match[1])
    return total


def array_shapes(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, dims) of every array that a text mentions."""
    return {
        (kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in
        set(_ARRAY.findall(text))
    }


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a program needs on one device.

    Attributes:
        total: Bytes, arguments included.
        largest: (bytes, the arrays that take turns in them), largest first.
    """

    total: int
    largest: list[tuple[int, str]]


_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_memory(text: str) -> Memory:
    """The device part of a memory usage report.

    Raises:
        ValueError: Not such a report.
    """
    match = re.search(r"\(color=0\)\nTotal bytes: (\d+)", text)
    if not match:
        raise ValueError(
            "memory report: expected 'color=0' and 'Total bytes' in it, found neither; another "
            "version of libtpu?"
        )
    section = re.split(r"\n\s*\n|Memory Space:", text[match.end():])[0]
    rows = re.findall(r"^\s*[\d.]+\w+\(.*?\);\s*([\d.]+)(\w+);\s*\d+;\s*\d+; (.*)$", section, re.M)
    largest = [(int(float(n) * _UNITS[unit]), shapes) for n, unit, shapes in rows]
    return Memory(int(match[1]), sorted(largest, key=lambda row: -row[0]))
