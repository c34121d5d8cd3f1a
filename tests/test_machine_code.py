"""Tests how the audit counts the executed instructions of a compiled kernel, without a GPU.

The kernel is compiled in a new process, because triton's interpreter and compiler can't be used in
the same process.
"""

import torch
import triton
import triton.language as tl

from benchmarks.audit.instructions import Flow
from benchmarks.audit.machine_code import per_element_and_share
from benchmarks.audit.sass import disassemble
from benchmarks.audit.standin import SM90, compile_only
from benchmarks.audit.trips import loop_trips
from tests.compiled import run_compiled


@triton.jit
def _copy_kernel(
    y_ptr, x_ptr, count, per_program, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """Copies UNROLL blocks per trip, then the rest block by block, then stores the program's id."""
    start = tl.program_id(0) * per_program
    stop = tl.minimum(start + per_program, count)
    whole = start + (stop - start) // (UNROLL * BLOCK) * (UNROLL * BLOCK)
    for at in tl.range(start, whole, UNROLL * BLOCK, num_stages=1):
        offsets = at + tl.arange(0, UNROLL * BLOCK)
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))
    for at in tl.range(whole, stop, BLOCK, num_stages=1):
        offsets = at + tl.arange(0, BLOCK)
        tl.store(
            y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < stop), mask=offsets < stop
        )
    tl.store(y_ptr + stop - tl.program_id(0), tl.program_id(0))


def check_copy():
    """Compares what the audit counts for `_copy_kernel` with numbers computed by hand."""
    block, count = 512, 10 * 512 * 3 + 2 * 512 + 256  # a block is one 16-byte load per thread
    x, y = torch.empty(count), torch.empty(count)
    launches = []
    with compile_only(SM90, launches.append):
        _copy_kernel[(4,)](
            y_ptr=y, x_ptr=x, count=count, per_program=10 * block, BLOCK=block, UNROLL=2
        )
    (launch,) = launches
    trips = loop_trips(launch.compiled.asm, launch.grid, launch.arguments)
    flow = Flow(disassemble(launch.compiled.asm["cubin"]).instructions, trips)
    # Three programs copy ten blocks each, two per trip. The last program copies 2.5 blocks.
    assert [loop.trips.tolist() for loop in flow.trips] == [[5, 5, 5, 1], [0, 0, 0, 1]]
    loaded = sum(i.access_bytes * times for i, times in flow.executed if i.name == "LDG")
    assert loaded == 16 * (10 + 10 + 10 + 2 + 1) / 4
    per_element, share = per_element_and_share(SM90, launch, flow)
    issued = sum(times for _, times in flow.executed) * 4 * 4  # 4 programs of 4 warps
    assert abs(per_element - issued * 32 / count) < 1e-9
    seconds = issued / (132 * 4 * 1.98e9)
    assert abs(share - seconds / (2 * 4 * count / 4.3e12)) < 1e-9
    assert flow.calls_in_loops == 0


def test_copy_whose_counts_are_known():
    result = run_compiled("-c", "from tests.test_machine_code import *; check_copy()")
    assert result.returncode == 0, result.stderr
