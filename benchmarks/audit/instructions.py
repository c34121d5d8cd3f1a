"""Counts a kernel's executed instructions, from its machine code and its loops' trip counts."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.audit.sass import Instruction
from benchmarks.audit.trips import LoopTrips

TARGET = re.compile(r"0x([0-9a-f]+)")
GLOBAL_ACCESS = ("LDG", "STG", "LDGSTS")


@dataclass(frozen=True)
class Span:
    """The addresses from ``start`` up to, but not including, ``stop``."""

    start: int
    stop: int

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.stop


@dataclass(frozen=True)
class Rest:
    """Code after an unrolled loop, which executes the remaining iterations.

    Attributes:
        span: addresses of the code.
        loop: index of the unrolled loop in `Flow.loops`.
        copies: number of iterations that the code executes.
    """

    span: Span
    loop: int
    copies: int


@dataclass(frozen=True)
class Flow:
    """The control flow of a kernel's machine code, and how often each instruction is executed.

    The control flow is derived from the addresses of branches, because the assembler (ptxas) keeps
    the order of the source:

    - A loop extends from the target of a backward branch to the branch.
    - Code that a forward branch skips is conditional.
    - Conditional code that calls a routine is a *slow path*, for example to divide by a denormal
      number. It is assumed not to be executed. Other conditional code is assumed to be executed.

    ptxas unrolls small loops by four: one trip of the unrolled loop executes four trips of the
    source. If the number of trips is not a multiple of four, conditional code after the loop
    executes two remaining trips, one remaining trip, or both.

    Attributes:
        instructions: all instructions.
        trips: trip counts of the loops, in the order of the loops' first instructions.
    """

    instructions: Sequence[Instruction]
    trips: Sequence[LoopTrips]

    @cached_property
    def kernel(self) -> list[Instruction]:
        """The kernel's own instructions, without the called routines and the padding after them.

        The padding starts with a branch instruction that jumps to itself.
        """
        ends = [
            target
            for i in self.instructions
            if (target := _target(i)) is not None
            and (self._calls_routine(i) or (i.name == "BRA" and target == i.address))
        ]
        return [i for i in self.instructions if not ends or i.address < min(ends)]

    @cached_property
    def loops(self) -> list[Span]:
        """The loops. An outer loop precedes its inner loops.

        Backward branches to the same target belong to one loop.
        """
        ends: dict[int, int] = {}
        for i, target in self._branches():
            if target <= i.address:
                ends[target] = max(ends.get(target, 0), i.address + 1)
        return [Span(start, stop) for start, stop in sorted(ends.items())]

    @cached_property
    def depths(self) -> list[int]:
        """The number of loops around each loop."""
        return [self._depth(loop.start) - 1 for loop in self.loops]

    @cached_property
    def conditional(self) -> list[Span]:
        """The pieces of code that forward branches skip, the shortest piece first.

        Pieces that contain a loop are left out.
        """
        skipped = [Span(i.address + 1, target) for i, target in self._branches()]
        found = [s for s in skipped if not any(loop.start in s for loop in self.loops)]
        return sorted((s for s in found if s.start < s.stop), key=lambda s: s.stop - s.start)

    @cached_property
    def slow_paths(self) -> list[Span]:
        """The shortest piece of conditional code around each call of a routine."""
        around = (
            next((span for span in self.conditional if i.address in span), None)
            for i in self.kernel
            if self._calls_routine(i)
        )
        return [span for span in around if span is not None]

    @cached_property
    def calls_in_loops(self) -> int:
        """The number of calls inside loops, including those on slow paths."""
        return sum(self._depth(i.address) > 0 for i in self.kernel if self._calls_routine(i))

    @cached_property
    def unrolled(self) -> list[int]:
        """For each loop, the number of trips that ptxas combined into one.

        This is the number of accesses to global memory in the loop's machine code, divided by the
        number of accesses in the loop's PTX, which is not unrolled.
        """
        return [
            max(self._accesses(span) // loop.accesses, 1) if loop.accesses else 1
            for span, loop in zip(self.loops, self.trips, strict=True)
        ]

    @cached_property
    def rests(self) -> list[Rest]:
        """The code for the remaining trips of unrolled loops."""
        found = []
        for n, (loop, copies) in enumerate(zip(self.loops, self.unrolled, strict=True)):
            at = loop.stop
            while copies > 1:
                copies //= 2
                accesses = copies * self.trips[n].accesses
                spans = [s for s in self.conditional if s.start >= at]
                span = min(
                    (s for s in spans if self._accesses(s) == accesses),
                    key=lambda s: s.start,
                    default=None,
                )
                if span is not None:
                    found.append(Rest(span, n, copies))
                    at = span.stop
        return found

    @cached_property
    def executed(self) -> list[tuple[Instruction, float]]:
        """Each instruction, and how often a warp executes it, averaged over the programs.

        Instructions of called routines are not included.

        Raises:
            ValueError: if the loops do not match ``trips``, or if a trip count is unknown.
        """
        expected = [loop.depth for loop in self.trips]
        if self.depths != expected:
            raise ValueError(
                f"the loops of the machine code have nesting depths {self.depths}, "
                f"but the loops of triton's TTGIR have nesting depths {expected}"
            )
        trips = [loop.trips for loop in self.trips if loop.trips is not None]
        if len(trips) < len(self.trips):
            raise ValueError("trips must be known for every loop, got None")
        found = []
        times: dict[tuple[int, ...], float] = {}
        for i in self.kernel:
            inside = tuple(n for n, loop in enumerate(self.loops) if i.address in loop)
            if inside not in times:
                each = [trips[n] // self.unrolled[n] for n in inside]
                times[inside] = float(np.mean(np.prod(each, axis=0)))
            count = times[inside]
            rest = next((rest for rest in self.rests if i.address in rest.span), None)
            if any(i.address in span for span in self.slow_paths):
                count = 0.0
            elif rest is not None:
                left = trips[rest.loop] // rest.copies % 2
                count = float(np.mean(np.prod([left, *(trips[n] for n in inside)], axis=0)))
            found.append((i, count))
        return found

    @property
    def main_loop(self) -> list[Instruction]:
        """The instructions of the innermost loop that executes the most instructions.

        If the loops do not match ``trips``, the instructions of the longest loop are returned.
        """
        if self.depths != [loop.depth for loop in self.trips]:
            main = max(self.loops, key=lambda loop: loop.stop - loop.start)
        else:
            innermost = [
                loop
                for loop in self.loops
                if not any(other.start in loop for other in self.loops if other != loop)
            ]
            main = max(innermost, key=self._executed_in)
        return [i for i in self.kernel if i.address in main]

    def _executed_in(self, span: Span) -> float:
        return sum(count for i, count in self.executed if i.address in span)

    def _accesses(self, span: Span) -> int:
        return sum(i.address in span and i.name in GLOBAL_ACCESS for i in self.kernel)

    def _depth(self, address: int) -> int:
        return sum(address in loop for loop in self.loops)

    def _branches(self) -> Iterator[tuple[Instruction, int]]:
        """Yields the branches inside the kernel, with their targets."""
        for i in self.kernel:
            target = _target(i) if i.name == "BRA" else None
            if target is not None and target <= self.kernel[-1].address:
                yield i, target

    def _calls_routine(self, i: Instruction) -> bool:
        """Whether an instruction calls a routine that returns. ptxas also uses CALL as a jump."""
        target = _target(i)
        if i.name != "CALL" or target is None:
            return False
        ends = (j.name for j in self.instructions if j.address >= target)
        return next((name for name in ends if name in ("RET", "EXIT")), "") == "RET"


def _target(i: Instruction) -> int | None:
    found = TARGET.search(i.operands)
    return int(found[1], 16) if found else None
