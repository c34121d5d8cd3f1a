"""Counts what a launch executes and moves, and estimates what limits its time. Nothing is measured.

Times are multiples of the *byte time*, what the least bytes of the launch take at a copy's bandwidth.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from benchmarks.audit.instructions import HALF_RATE, Flow, load_waits
from benchmarks.audit.standin import Gpu, Launch

# H200: bytes/s of a copy, warp instructions a cycle and multiprocessor, cycles/s, seconds until a load
# arrives, floating-point operations/s of a bf16 matrix product.
BANDWIDTH, ISSUE_WIDTH, CLOCK, LATENCY, MATRIX_RATE = 4.3e12, 4, 1.98e9, 0.8e-6, 788e12
# What takes no more than this, in byte times, is not said to bound a launch.
MARGIN = 1.1


@dataclass(frozen=True)
class Work:
    """What a launch executes.

    Attributes:
        per_element: instructions that threads execute for each element of the launch's largest tensor.
        share: time to issue them, in byte times. An instruction of `HALF_RATE` takes two cycles, so it
            is at least twice the share of these.
        calls: of routines, in loops.
        bound: what limits the launch's time, by estimate.
    """

    per_element: float | None = None
    share: float | None = None
    calls: int | None = None
    bound: str = ""


def used_tensors(launch: Launch) -> list[Tensor]:
    """The tensors that a kernel reads or writes, of those that it is given."""
    _, _, body = launch.compiled.asm["ttgir"].partition("tt.func public")
    _, _, body = body.partition("\n")
    return [
        value
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor) and re.search(rf"%{name}\b", body)
    ]


def work_of(
    gpu: Gpu, launch: Launch, flow: Flow, room: int, others: Mapping[str, float] | None = None
) -> Work:
    """What a launch executes, each byte of its tensors being moved once.

    Args:
        gpu: one whose rates are those above.
        launch: the launch.
        flow: its machine code.
        room: programs that a multiprocessor has room for.
        others: other times that may bound it, in byte times.
    """
    tensors = used_tensors(launch)
    byte_time = sum(t.numel() * t.element_size() for t in tensors) / BANDWIDTH
    programs = prod(launch.grid)
    warps = programs * launch.compiled.metadata.num_warps
    executed = flow.executed
    issued = warps * sum(count for _, count in executed)
    halved = warps * sum(count for i, count in executed if i.name in HALF_RATE)
    cycles = max(issued, 2 * halved) / (gpu.sm_count * ISSUE_WIDTH)
    share = cycles / CLOCK / byte_time
    turns = -(-programs // (room * gpu.sm_count))
    waits = load_waits(
        executed, launch.arguments.get("STAGES", launch.compiled.metadata.num_stages)
    )
    times = {"instructions": share, "dependent loads": turns * waits * LATENCY / byte_time}
    times |= others or {}
    bound = max(times, key=lambda name: times[name])
    return Work(
        32 * issued / max(t.numel() for t in tensors),
        share,
        flow.calls_in_loops,
        bound if times[bound] > MARGIN else "bandwidth",
    )
