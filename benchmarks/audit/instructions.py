"""How many instructions a kernel executes: those of its machine code, weighted by its loops' trips."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.audit.sass import Instruction
from benchmarks.audit.trips import LoopTrips

TARGET = re.compile(r"0x([0-9a-f]+)")
GLOBAL_ACCESS = ("LDG", "STG", "LDGSTS")
# What the ALU executes, which takes two cycles for a warp on Hopper: integer addition, logic and shifts,
# comparison, selection, minimum and maximum, byte permutes, packing. (The vendor's manual; not measured.)
HALF_RATE = frozenset({
    "BMSK", "F2FP", "FMNMX", "FSEL", "FSET", "FSETP", "HMNMX2", "HSET2", "HSETP2", "IABS", "IADD", "IADD3",
    "IMNMX", "ISETP", "LEA", "LOP3", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "SHL", "SHR",
    "VABSDIFF", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3",
})  # fmt: skip


@dataclass(frozen=True)
class Span:
    """The addresses of some instructions: from ``start`` to before ``stop``."""

    start: int
    stop: int

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.stop


@dataclass(frozen=True)
class Rest:
    """The code of ``copies`` trips that an unrolled loop, the ``loop``-th, may leave."""

    span: Span
    loop: int
    copies: int


@dataclass(frozen=True)
class Flow:
    """The control flow of a kernel's machine code, and how often each instruction is executed.

    It is read from addresses, as ptxas arranges a program in the order of its source: a loop goes from
    the target of a backward branch to that branch; what a forward branch skips is conditional.
    Conditional code is counted as executed, but for slow paths: these are conditional and call a routine
    (of division or a square root, for operands that are denormal or too wide for the fast path).
    ptxas unrolls small loops: four trips in one, then conditional code for two and for one that may be
    left.

    Attributes:
        instructions: all of them.
        trips: of the loops, in the order in which they begin.
        taken: how often conditional code is executed.
    """

    instructions: Sequence[Instruction]
    trips: Sequence[LoopTrips]
    taken: float = 1.0

    @cached_property
    def kernel(self) -> list[Instruction]:
        """The instructions without routines and padding, which follow them."""
        ends = [_target(i) for i in self.instructions if self._calls_routine(i)]
        ends += [
            i.address for i in self.instructions if i.name == "BRA" and _target(i) == i.address
        ]
        end = min((end for end in ends if end is not None), default=None)
        return [i for i in self.instructions if end is None or i.address < end]

    @cached_property
    def loops(self) -> list[Span]:
        """The loops, each before those inside it; branches back to one place are one loop."""
        ends: dict[int, int] = {}
        for i, target in self._branches():
            if target <= i.address:
                ends[target] = max(ends.get(target, 0), i.address + 1)
        return [Span(start, stop) for start, stop in sorted(ends.items())]

    @cached_property
    def depths(self) -> list[int]:
        """How many loops are around each."""
        return [self._depth(loop.start) - 1 for loop in self.loops]

    @cached_property
    def conditional(self) -> list[Span]:
        """What a branch inside one iteration of a loop skips, the shortest first."""
        skipped = [Span(i.address + 1, target) for i, target in self._branches()]
        found = [s for s in skipped if not any(loop.start in s for loop in self.loops)]
        return sorted((s for s in found if s.start < s.stop), key=lambda s: s.stop - s.start)

    @cached_property
    def slow_paths(self) -> list[Span]:
        """Of the conditional code that which calls a routine."""
        around = (
            next((span for span in self.conditional if i.address in span), None)
            for i in self.kernel
            if self._calls_routine(i)
        )
        return [span for span in around if span is not None]

    @cached_property
    def calls_in_loops(self) -> int:
        """How many calls stand in loops, slow paths included."""
        return sum(self._depth(i.address) > 0 for i in self.kernel if self._calls_routine(i))

    @cached_property
    def unrolled(self) -> list[int]:
        """How many trips of each loop are one in the machine code: by its accesses of global memory."""
        return [
            max(self._accesses(span) // loop.accesses, 1) if loop.accesses else 1
            for span, loop in zip(self.loops, self.trips, strict=True)
        ]

    @cached_property
    def rests(self) -> list[Rest]:
        """The code of the trips that are left by unrolled loops."""
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
        """Each instruction, and how often a warp executes it: the mean over the programs.

        A called routine is executed from its first instruction to its return.

        Raises:
            ValueError: if the loops are not those of ``trips``, or one of those depends on data.
        """
        expected = [loop.depth for loop in self.trips]
        if self.depths != expected:
            raise ValueError(
                f"the machine code has loops of depths {self.depths}, "
                f"expected {expected} as in triton's code"
            )
        trips = [loop.trips for loop in self.trips if loop.trips is not None]
        if len(trips) < len(self.trips):
            raise ValueError("the trips of a loop depend on data: say how many they are")
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
            elif any(i.address in span for span in self.conditional):
                count *= self.taken
            found.append((i, count))
            if count and self._calls_routine(i):
                found += [(each, count) for each in self._routine(i)]
        return found

    @property
    def main_loop(self) -> list[Instruction]:
        """The innermost loop with the most executed instructions; the whole kernel without a loop.

        Where the loops are not those of ``trips``, it is the longest.
        """
        if not self.loops:
            return self.kernel
        known = all(loop.trips is not None for loop in self.trips)
        if known and self.depths == [loop.depth for loop in self.trips]:
            innermost = [
                loop
                for loop in self.loops
                if not any(other.start in loop for other in self.loops if other != loop)
            ]
            main = max(innermost, key=self._executed_in)
        else:
            main = max(self.loops, key=lambda loop: loop.stop - loop.start)
        return [i for i in self.kernel if i.address in main]

    def _executed_in(self, span: Span) -> float:
        return sum(count for i, count in self.executed if i.address in span)

    def _accesses(self, span: Span) -> int:
        return sum(i.address in span and i.name in GLOBAL_ACCESS for i in self.kernel)

    def _depth(self, address: int) -> int:
        return sum(address in loop for loop in self.loops)

    def _branches(self) -> Iterator[tuple[Instruction, int]]:
        """The kernel's branches to another place in it."""
        for i in self.kernel:
            target = _target(i) if i.name == "BRA" else None
            if target is not None and target <= self.kernel[-1].address:
                yield i, target

    def _calls_routine(self, i: Instruction) -> bool:
        """Whether it is a call that returns; ptxas also writes calls that are jumps."""
        return i.name == "CALL" and self._routine(i)[-1].name == "RET"

    def _routine(self, call: Instruction) -> list[Instruction]:
        """The called instructions, up to the first that ends a routine or a kernel."""
        start = _target(call)
        found = [call]
        for i in self.instructions:
            if start is not None and i.address >= start:
                found.append(i)
                if i.name in ("RET", "EXIT"):
                    break
        return found[1:] or found


def _target(i: Instruction) -> int | None:
    found = TARGET.search(i.operands)
    return int(found[1], 16) if found else None


def load_waits(executed: Sequence[tuple[Instruction, float]], stages: int) -> float:
    """How often a warp waits for loads that it has asked for, one wait for all that it asked together.

    With a pipeline of ``stages`` a copy is waited for while those of later stages are under way.
    """
    pending: set[int] = set()
    waits = 0.0
    for i, count in executed:
        if not count:
            continue
        if i.name == "DEPBAR":
            waits += count / max(stages - 1, 1)
        elif pending & i.named:
            waits += count
            pending.clear()
        if i.name == "LDG":
            pending |= i.written
    return waits
