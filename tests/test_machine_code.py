"""Tests of the kernels' machine code, compiled in a new process without a GPU.

The interpreter and the compiler can't share a process. ``python -m benchmarks audit``, which
``.ci/run`` runs, compiles more specialisations for more GPUs.
"""

import json

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.audit import budget, machine_code
from benchmarks.audit.bounds import work_of
from benchmarks.audit.standin import SM90, compile_only
from tests.compiled import run_compiled


@triton.jit
def _copy_kernel(
    y_ptr, x_ptr, count, per_program, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """Copies whole tiles, then the rest in blocks; stores the program's id at the end."""
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
    """Compares the counted instructions and bytes of a copy with counts by hand."""
    block, count = 512, 10 * 512 * 3 + 2 * 512 + 256  # a block is one 16-byte load per thread
    x, y = torch.empty(count), torch.empty(count)
    launches = []
    with compile_only(SM90, launches.append):
        _copy_kernel[(4,)](
            y_ptr=y, x_ptr=x, count=count, per_program=10 * block, BLOCK=block, UNROLL=2
        )
    (launch,) = launches
    flow = machine_code.flow_of(launch)
    # Three programs copy ten blocks, two per trip; the last one copies two and a half blocks.
    assert [loop.trips.tolist() for loop in flow.trips] == [[5, 5, 5, 1], [0, 0, 0, 1]]
    loaded = sum(i.access_bytes * times for i, times in flow.executed if i.name == "LDG")
    assert loaded == 16 * (10 + 10 + 10 + 2 + 1) / 4
    work = work_of(SM90, launch, flow, room=8)
    issued = sum(times for _, times in flow.executed) * 4 * 4  # 4 programs of 4 warps
    assert abs(work.per_element - issued * 32 / count) < 1e-9
    seconds = issued / (132 * 4 * 1.98e9)
    assert work.share >= seconds / (2 * 4 * count / 4.3e12) * (1 - 1e-9)
    assert (work.calls, work.bound) == (0, "dependent loads")  # the copy is small


def test_copy_whose_counts_are_known():
    result = run_compiled("-c", "from tests.test_machine_code import *; check_copy()")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_every_kernel_family_is_within_its_budget():
    result = run_compiled("-m", "benchmarks.audit.machine_code", "--gpu", "sm_90", "--families")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len({row["kernel"] for row in rows}) == 15
    assert [row["case"] for row in rows if row["missing"]] == []
    short = [row["case"] for row in rows if row["in_flight"] < row["wanted"]]
    assert short == []
    assert all(row["work"]["share"] > 0 and row["work"]["calls"] == 0 for row in rows)
    found = budget.Found([], {}, {}, {}, budget.worst(rows))
    assert budget.exceeded(found, budget.load(), same_triton=False) == []
