"""Computes the trip counts of a compiled kernel's loops.

TTGIR is triton's last representation of a kernel before LLVM. It contains the loops and the integer
arithmetic that computes their bounds. This module evaluates the arithmetic with a launch's
arguments, for all programs of the grid at once.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

OPERATION = re.compile(r"(%[\w.-]+) = ([\w.]+) (.*)")
LOOP = re.compile(r"scf\.for (?:unsigned )?%[\w.-]+ = (%[\w.-]+) to (%[\w.-]+) step (%[\w.-]+)")
LABEL = re.compile(r"\s*(\$L__BB\w+):")
BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);")
ACCESS = re.compile(r"\b(?:(?:ld|st)\.global|cp\.async\.c[ag])\b")
ARGUMENT = re.compile(r"%(\w+): i\d+")
VALUE = re.compile(r"%[\w.-]+")


def _divide(a: Any, b: Any) -> Any:
    """Divides integers and rounds towards zero, as in C."""
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _remainder(a: Any, b: Any) -> Any:
    return a - b * _divide(a, b)


# The operations of TTGIR that compute the bounds of loops.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "arith.addi": np.add, "arith.subi": np.subtract, "arith.muli": np.multiply,
    "arith.divsi": _divide, "arith.remsi": _remainder, "arith.minsi": np.minimum,
    "arith.maxsi": np.maximum,
}  # fmt: skip


@dataclass(frozen=True)
class LoopTrips:
    """Trip counts of a loop.

    Attributes:
        depth: number of loops around the loop.
        trips: for each program, how many trips the loop makes when it is executed once. None if not
            known, for example because the bounds depend on data.
        accesses: number of instructions in the loop's PTX that access global memory, or 0 if not
            known.
    """

    depth: int
    trips: np.ndarray | None
    accesses: int = 0


def loop_trips(
    asm: Mapping[str, str], grid: Sequence[int], arguments: Mapping[str, Any]
) -> list[LoopTrips]:
    """Returns the trip counts of a kernel's loops, in the order of the loops' first lines.

    Args:
        asm: the kernel's code. The keys ``ttgir`` and ``ptx`` are used.
        grid: the launch's grid.
        arguments: the launch's arguments, by name.
    """
    loops = _loops(asm["ttgir"], grid, arguments)
    accesses = _accesses(asm["ptx"])
    if len(accesses) != len(loops):
        return loops
    return [replace(loop, accesses=n) for loop, n in zip(loops, accesses, strict=True)]


def _accesses(ptx: str) -> list[int]:
    """Counts the accesses to global memory in each loop of PTX."""
    lines = ptx.splitlines()
    labels = {found[1]: n for n, line in enumerate(lines) if (found := LABEL.match(line))}
    ends: dict[int, int] = {}
    for n, line in enumerate(lines):
        branch = BRANCH.search(line)
        if branch and labels[branch[1]] <= n:
            ends[labels[branch[1]]] = n
    return [
        sum(ACCESS.search(line) is not None for line in lines[start:end])
        for start, end in sorted(ends.items())
    ]


def _loops(ttgir: str, grid: Sequence[int], arguments: Mapping[str, Any]) -> list[LoopTrips]:
    """Returns the loops of TTGIR."""
    programs = np.indices((*grid, 1, 1)[:3]).reshape(3, -1)
    values: dict[str, Any] = {}
    found: list[LoopTrips] = []
    level = 0
    around: list[int] = []  # brace levels of the loops that contain the current line
    for line in ttgir.splitlines():
        text = line.strip()
        if text.startswith("tt.func"):
            named = ((name, arguments.get(name)) for name in ARGUMENT.findall(text))
            values |= {f"%{name}": value for name, value in named if isinstance(value, int)}
        elif loop := LOOP.search(text):
            start, stop, step = (values.get(name) for name in loop.groups())
            trips = None
            if start is not None and stop is not None and step is not None:
                trips = np.maximum(-((start - stop) // step), 0)
                trips = np.broadcast_to(trips, programs.shape[1])
            found.append(LoopTrips(len(around), trips))
            around.append(level)
        elif operation := OPERATION.match(text):
            name, kind, rest = operation.groups()
            value = _evaluate(kind, rest, values, programs)
            if value is not None:
                values[name] = value
        level += text.count("{") - text.count("}")
        while around and level <= around[-1]:
            around.pop()
    return found


def _evaluate(kind: str, rest: str, values: dict[str, Any], programs: np.ndarray) -> Any:
    """Returns the result of an operation on integers, or None if the result is not known."""
    if kind == "tt.get_program_id":
        return programs["xyz".index(rest[0])]
    if kind == "arith.constant":
        number = re.match(r"(-?\d+) : (?:i\d+|index)\b", rest)
        return int(number[1]) if number else None
    operands = [values.get(name) for name in VALUE.findall(rest.split(" loc(")[0])]
    if kind not in OPERATIONS or any(operand is None for operand in operands):
        return None
    return OPERATIONS[kind](*operands)
