"""Compiles kernels without a GPU, and analyses their machine code.

``python -m benchmarks audit`` runs this module in one process for each GPU architecture, and
compares the results with the recorded budget.
"""

import json
import re
import sys
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.audit.compiled_cases import BATCH, Case, all_cases, family_cases
from benchmarks.audit.instructions import Flow
from benchmarks.audit.sass import Instruction, async_bytes, bytes_before_first_use, disassemble
from benchmarks.audit.standin import GPUS, SM90, Gpu, Launch, compile_only
from benchmarks.audit.trips import loop_trips

# The rates of an H200: bytes/s of a copy, warp instructions that a multiprocessor issues in a
# cycle, and cycles/s.
BANDWIDTH, ISSUE_WIDTH, CLOCK = 4.3e12, 4, 1.98e9
# To reach the bandwidth, a multiprocessor must have this many bytes of loads in flight:
# bandwidth · latency / number of multiprocessors (4.3 TB/s · 0.8 µs / 132), rounded up to a power
# of two.
BYTES_IN_FLIGHT = 32 * 1024
# For each architecture, the start of the names of matrix instructions for 16-bit and TF32 operands.
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTC"}
# The GPU reserves RESERVED_SHARED extra bytes of shared memory for each program. It rounds the
# registers per thread up to a multiple of REGISTER_UNIT.
RESERVED_SHARED, REGISTER_UNIT = 1024, 8
# In AMD's assembly: the numbers of vector registers, spilled scalar registers and spilled vector
# registers.
AMD_FIELD = re.compile(r"\.(vgpr_count|[sv]gpr_spill_count):\s+(\d+)")
# Names of the arguments that point to activations that a kernel loads.
LOADED = ("x_ptr", "dy_ptr", "dy_skip_ptr", "residual_ptr")


@dataclass(frozen=True)
class Row:
    """Properties of one compiled kernel. A number is None if it was not determined.

    Attributes:
        gpu: name of the GPU that the kernel was compiled for.
        kernel: name of the kernel.
        case: description of a call that launches the kernel.
        layout: memory layout of the activations.
        dtype: dtype of the activations.
        registers: number of registers of a thread.
        spills: number of instructions that access local memory, where spilled registers are stored.
            On AMD it is the number of spilled registers.
        missing: names of the instructions that a convolution should have but lacks.
        calls: number of subroutine calls inside loops.
        in_flight: bytes of loads that a multiprocessor has in flight, divided by the bytes needed
            to hide the latency of memory, but at most 1.
        per_element: number of executed instructions, added up over all threads, divided by the
            number of elements of the largest tensor.
        share: time to issue the instructions divided by the time to move the bytes.
    """

    gpu: str
    kernel: str
    case: str
    layout: str
    dtype: str
    registers: int
    spills: int
    missing: str = ""
    calls: int | None = None
    in_flight: float | None = None
    per_element: float | None = None
    share: float | None = None


def read(gpu: Gpu, case: Case, launch: Launch) -> Row:
    """Returns the properties of a launched kernel's machine code.

    If the residual has a batch norm, ``(two norms)`` is appended to the kernel's name.
    """
    pointers = ("residual_rstd_ptr", "residual_var_ptr")
    two = any(launch.arguments.get(name) is not None for name in pointers)
    kernel = f"{launch.kernel} (two norms)" if two else launch.kernel
    names = gpu.name, kernel, case.title, case.layout, str(case.dtype).removeprefix("torch.")
    is_conv = "conv" in launch.kernel
    if gpu.target.backend == "hip":
        text = launch.compiled.asm["amdgcn"]
        field = {name: int(value) for name, value in AMD_FIELD.findall(text)}
        spills = field["vgpr_spill_count"] + field["sgpr_spill_count"]
        lacks = "matrix instructions" if is_conv and "v_mfma_" not in text else ""
        return Row(*names, field["vgpr_count"], spills, lacks)
    code = disassemble(launch.compiled.asm["cubin"])
    trips = loop_trips(launch.compiled.asm, launch.grid, launch.arguments)
    flow = Flow(code.instructions, trips)
    lacks = missing(gpu, launch, flow.main_loop) if is_conv else ""
    in_flight = per_element = share = None
    # Memory does not limit the speed of other kernels. ``finalize`` kernels access small tensors.
    if launch.kernel.startswith("_bn_") and "finalize" not in launch.kernel:
        in_flight = bytes_in_flight(gpu, launch, code.registers, flow.main_loop)
        if gpu is SM90 and case.batch == BATCH:
            per_element, share = per_element_and_share(gpu, launch, flow)
    return Row(
        *names, code.registers, code.spills, lacks, flow.calls_in_loops, in_flight, per_element,
        share,
    )  # fmt: skip


def missing(gpu: Gpu, launch: Launch, loop: list[Instruction]) -> str:
    """Names the instructions that the main loop of a convolution lacks.

    The loop should have matrix instructions, and should load the operands by TMA or by asynchronous
    copies. A copy should move 16 bytes, or all channels of a position if they have fewer bytes.
    """
    names = [i.name for i in loop]
    copies = [i for i in loop if i.name == "LDGSTS"]
    lacks = []
    if not any(name.startswith(MATRIX_INSTRUCTION[int(gpu.target.arch)]) for name in names):
        lacks.append("matrix instructions")
    width = min(16, launch.arguments["C"] * launch.arguments["x_ptr"].element_size())
    if "UTMALDG" not in names and not (copies and all(i.access_bytes == width for i in copies)):
        lacks.append(f"{width}-byte asynchronous copies")
    return " and ".join(lacks)


def bytes_in_flight(gpu: Gpu, launch: Launch, registers: int, loop: list[Instruction]) -> float:
    """Returns `Row.in_flight`.

    ``BYTES_IN_FLIGHT`` bytes are needed in flight, or all bytes that the multiprocessor loads if
    they are fewer.
    """
    threads = launch.compiled.metadata.num_warps * gpu.target.warp_size
    # While a stage of the pipeline is processed, the copies for the other stages are in flight.
    per_thread = bytes_before_first_use(loop)
    per_thread += async_bytes(loop) * (launch.arguments.get("STAGES", 1) - 1)
    programs = min(
        resident_programs(gpu, launch, registers, threads), -(-prod(launch.grid) // gpu.sm_count)
    )
    loaded = [launch.arguments.get(name) for name in LOADED]
    wanted = min(BYTES_IN_FLIGHT, sum(t.nbytes for t in loaded if t is not None) // gpu.sm_count)
    return min(programs * threads * per_thread / wanted, 1.0)


def resident_programs(gpu: Gpu, launch: Launch, registers: int, threads: int) -> int:
    """Returns how many programs fit on a multiprocessor at once."""
    units = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        gpu.registers // (units * threads),
        gpu.shared_memory // (launch.compiled.metadata.shared + RESERVED_SHARED),
        gpu.max_threads // threads,
        gpu.max_programs,
    )


def per_element_and_share(gpu: Gpu, launch: Launch, flow: Flow) -> tuple[float, float]:
    """Returns `Row.per_element` and `Row.share`. Assumes that each byte is moved once."""
    tensors = used_tensors(launch)
    warps = prod(launch.grid) * launch.compiled.metadata.num_warps
    issued = warps * sum(count for _, count in flow.executed)
    seconds = issued / (gpu.sm_count * ISSUE_WIDTH * CLOCK)
    byte_time = sum(t.nbytes for t in tensors) / BANDWIDTH
    return 32 * issued / max(t.numel() for t in tensors), seconds / byte_time


def used_tensors(launch: Launch) -> list[Tensor]:
    """Returns the tensor arguments that a kernel reads or writes."""
    _, _, body = launch.compiled.asm["ttgir"].partition("tt.func public")
    _, _, body = body.partition("\n")
    return [
        value
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor) and re.search(rf"%{name}\b", body)
    ]


def audit(gpu: Gpu, cases: list[Case]) -> list[Row]:
    """Returns a row for each combination of a compiled kernel, a grid and sizes of tensors."""
    rows: dict[tuple[Any, ...], Row] = {}
    for case in cases:
        launches: list[Launch] = []
        with compile_only(gpu, launches.append):
            case.run()
        for launch in launches:
            sizes = [t.numel() for t in launch.arguments.values() if isinstance(t, Tensor)]
            key = launch.compiled.hash, launch.grid, *sizes
            if key not in rows:
                rows[key] = read(gpu, case, launch)
    return list(rows.values())


def main() -> None:
    """Prints the rows of the GPU that the command line names, as JSON."""
    torch.set_num_threads(1)
    gpu = GPUS[sys.argv[1]]
    cases = all_cases() if gpu is SM90 else family_cases()
    print(json.dumps([asdict(row) for row in audit(gpu, cases)]))


if __name__ == "__main__":
    main()
