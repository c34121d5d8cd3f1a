"""Estimates what limits the time of a launch, from its instructions and its bytes.

Nothing is measured. The unit of time is the *byte time*: the time to move each byte of the launch's
tensors once, at the bandwidth of a copy.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from benchmarks.audit.instructions import HALF_RATE, Flow, load_waits
from benchmarks.audit.standin import Gpu, Launch

# These are the rates of an H200: bytes/s of a copy, number of warp instructions that a
# multiprocessor issues in a cycle, cycles/s, seconds of a load's latency, and FLOP/s of a matrix
# product in bf16.
BANDWIDTH, ISSUE_WIDTH, CLOCK, LATENCY, MATRIX_RATE = 4.3e12, 4, 1.98e9, 0.8e-6, 788e12
# A launch is described as limited by the bandwidth, unless another limit takes more than this many
# byte times.
MARGIN = 1.1


@dataclass(frozen=True)
class Work:
    """The work of a launch. A number is None if it was not counted.

    Attributes:
        per_element: instructions that all threads execute, divided by the number of elements of the
            launch's largest tensor.
        share: time to issue the instructions, in byte times. Two times are computed: one cycle for
            each instruction, and two cycles for each instruction in `HALF_RATE`. The longer time is
            used.
        calls: number of subroutine calls inside loops.
        bound: estimate of what limits the launch's time.
    """

    per_element: float | None = None
    share: float | None = None
    calls: int | None = None
    bound: str = ""


def used_tensors(launch: Launch) -> list[Tensor]:
    """Returns the tensor arguments that a kernel reads or writes."""
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
    """Counts the work of a launch, assuming that each byte of its tensors is moved once.

    Args:
        gpu: GPU whose number of multiprocessors is used. Its rates are assumed to be the rates of
            an H200.
        launch: the launch.
        flow: control flow of the launch's machine code.
        room: number of programs that fit on a multiprocessor at once.
        others: further times that may limit the launch. The keys are names, the values are byte
            times.
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
