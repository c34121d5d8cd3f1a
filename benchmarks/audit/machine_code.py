"""Compiles the kernels of a ResNet step, without a GPU, and analyses their machine code.

``python -m benchmarks audit`` runs this module in separate processes and compares the results with
the recorded budget. Separate processes are needed because a process can't use both triton's
interpreter and its compiler.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.audit import amdgcn
from benchmarks.audit.bounds import BANDWIDTH, MATRIX_RATE, Work, used_tensors, work_of
from benchmarks.audit.compiled_cases import (
    AUGMENT_LAYOUT,
    CONV_LAYOUT,
    AugmentCase,
    Case,
    all_cases,
    all_convs,
    augment_cases,
    family_cases,
    family_convs,
    launch_augment,
    launch_conv,
    launch_step,
)
from benchmarks.audit.instructions import Flow
from benchmarks.audit.sass import (
    async_bytes,
    bytes_before_first_use,
    disassemble,
    load_bytes,
    store_bytes,
)
from benchmarks.audit.standin import GPUS, SM90, Gpu, Launch, compile_only
from benchmarks.audit.trips import loop_trips
from bnres.routes import ConvCall

# To reach the bandwidth, a multiprocessor must have this many bytes of loads in flight. The number
# is bandwidth times latency (about 4.3 TB/s · 0.8 µs), divided by 132 multiprocessors and rounded
# up.
BYTES_IN_FLIGHT = 32 * 1024
WIDE = 16
# For each architecture this is the name of the matrix instruction for 16-bit and TF32 operands.
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTC"}
RESERVED_SHARED = 1024
REGISTER_UNIT = 8
# Instructions are only counted for this batch size and GPU.
COUNTED_BATCH, COUNTED_GPU = 256, SM90
# The loops of augmentation kernels are assumed to have this trip count, because the real one
# depends on random values. The assumed number is the number of taps along an axis if the resize
# does not shrink the image.
RESIZE_TAPS = 4
# This fraction of the conditional code of augmentation kernels is assumed to be executed. An image
# has four colour steps, and each step executes one of four operations.
AUGMENT_TAKEN = 1 / 4
NOT_COUNTED = Work()


@dataclass(frozen=True)
class Row:
    """Properties of one compiled kernel.

    Attributes:
        gpu: name of the GPU that the kernel was compiled for.
        kernel: name of the kernel.
        case: description of a launch of the kernel.
        layout: memory layout of the activations.
        dtype: dtype of the activations.
        registers: number of registers of a thread.
        shared_memory: bytes of shared memory of a program.
        spills: number of accesses to local memory. On AMD it is the number of spilled registers.
        narrow: number of bytes that accesses of less than 16 bytes move, divided by the number of
            bytes that accesses of 16 bytes move. This ratio is computed for loads and for stores,
            and the greater one is used. On AMD the value is 1 if there are no 16-byte accesses,
            otherwise 0.
        in_flight: number of bytes of loads that a multiprocessor has in flight, or 0 if it is not
            known.
        wanted: least value of ``in_flight`` that hides the latency of memory.
        occupancy: number of threads that fit on a multiprocessor at once, divided by the greatest
            number that the hardware allows.
        matrix: name of the matrix instruction that a convolution uses.
        missing: instructions that the main loop of a convolution should have, but does not have.
        work: work of the launch, if it was counted.
    """

    gpu: str
    kernel: str
    case: str
    layout: str
    dtype: str
    registers: int
    shared_memory: int
    spills: int
    narrow: float
    in_flight: int
    wanted: int
    occupancy: float
    matrix: str = ""
    missing: str = ""
    work: Work = NOT_COUNTED


def kernel_name(launch: Launch) -> str:
    """Returns the kernel's name. ``(two norms)`` follows it if the residual has a batch norm."""
    pointers = ("residual_rstd_ptr", "residual_var_ptr")
    two = any(launch.arguments.get(name) is not None for name in pointers)
    return f"{launch.kernel} (two norms)" if two else launch.kernel


def is_finalize(launch: Launch) -> bool:
    """Whether a kernel only reads and writes per-channel buffers."""
    return "finalize" in launch.kernel


def resident_programs(gpu: Gpu, registers: int, shared: int, threads: int) -> int:
    """Returns how many programs fit on a multiprocessor at once.

    Args:
        gpu: the GPU.
        registers: registers of a thread.
        shared: bytes of shared memory of a program.
        threads: threads of a program.
    """
    units = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        gpu.registers // (units * threads),
        gpu.shared_memory // shared if shared else gpu.max_programs,
        gpu.max_threads // threads,
        gpu.max_programs,
    )


def flow_of(launch: Launch, taken: float = 1.0, data_trips: int | None = None) -> Flow:
    """Returns the control flow of a launch.

    ``data_trips`` is the assumed trip count of loops whose trip counts depend on data.
    """
    loops = loop_trips(launch.compiled.asm, launch.grid, launch.arguments)
    if data_trips is not None:
        trips = np.array([data_trips])
        loops = [replace(loop, trips=trips) if loop.trips is None else loop for loop in loops]
    return Flow(disassemble(launch.compiled.asm["cubin"]).instructions, loops, taken)


def read_row(gpu: Gpu, case: Case, launch: Launch) -> Row:
    """Returns the properties of a batch norm kernel's machine code."""
    threads = launch.compiled.metadata.num_warps * gpu.target.warp_size
    dtype = str(case.dtype).removeprefix("torch.")
    if gpu.target.backend == "hip":
        return _amd_row(gpu, launch, str(case), case.layout, dtype, threads)
    code = disassemble(launch.compiled.asm["cubin"])
    flow = flow_of(launch)
    shared = launch.compiled.metadata.shared + RESERVED_SHARED
    room = resident_programs(gpu, code.registers, shared, threads)
    narrow, in_flight, wanted = 0.0, 0, 0
    others = {}
    if not is_finalize(launch):
        loop = flow.main_loop
        counts = (load_bytes, store_bytes) if stores_tensor(launch) else (load_bytes,)
        narrow = max(
            sum(count(loop, width) for width in (1, 2, 4, 8)) / max(count(loop, WIDE), 1)
            for count in counts
        )
        # While a stage is processed, the asynchronous copies of the other stages are in flight.
        per_thread = bytes_before_first_use(loop)
        per_thread += async_bytes(loop) * (launch.arguments.get("STAGES", 1) - 1)
        programs = prod(launch.grid)
        in_flight = min(room, -(-programs // gpu.sm_count)) * threads * per_thread
        tensors = 1 if launch.kernel == "_bn_stats_kernel" else loaded_tensors(launch)
        share = tensors * case.site.channels * case.site.size**2 * case.batch
        wanted = min(BYTES_IN_FLIGHT, share * case.dtype.itemsize // gpu.sm_count)
        others = {"bytes in flight": wanted / max(in_flight, 1)}
    work = NOT_COUNTED
    if gpu is COUNTED_GPU and case.batch == COUNTED_BATCH:
        work = work_of(gpu, launch, flow, room, others)
    return Row(
        gpu.name, kernel_name(launch), str(case), case.layout, dtype, code.registers, shared,
        code.spills, narrow, in_flight, wanted, room * threads / gpu.max_threads, work=work,
    )  # fmt: skip


def read_conv(gpu: Gpu, call: ConvCall, launch: Launch) -> Row:
    """Returns the properties of a convolution's machine code, and which instructions it lacks.

    The main loop should load the operands by TMA or by asynchronous copies. A copy should move 16
    bytes, unless all channels of a position together have fewer than 16 bytes.
    """
    threads = launch.compiled.metadata.num_warps * gpu.target.warp_size
    if gpu.target.backend == "hip":
        return _amd_row(gpu, launch, call.key, CONV_LAYOUT, call.dtype, threads)
    code = disassemble(launch.compiled.asm["cubin"])
    flow = flow_of(launch)
    loop = flow.main_loop
    names = [i.name for i in loop]
    copies = [i for i in loop if i.name == "LDGSTS"]
    matrix = MATRIX_INSTRUCTION[int(gpu.target.arch)]
    missing = []
    if not any(name.startswith(matrix) for name in names):
        matrix = ""
        missing.append("matrix instructions")
    x = launch.arguments["x_ptr"]
    wide = min(WIDE, launch.arguments["C"] * x.element_size())
    if "UTMALDG" not in names and not (copies and all(i.access_bytes == wide for i in copies)):
        missing.append(f"{wide}-byte asynchronous copies")
    shared = launch.compiled.metadata.shared + RESERVED_SHARED
    room = resident_programs(gpu, code.registers, shared, threads)
    work = NOT_COUNTED
    if gpu is COUNTED_GPU:
        operations = 2 * launch.arguments["y_ptr"].numel() * launch.arguments["C"] * call.shape.taps
        rate = MATRIX_RATE * 2 / x.element_size()  # TF32 has half the rate of bf16
        byte_time = sum(t.numel() * t.element_size() for t in used_tensors(launch)) / BANDWIDTH
        work = work_of(gpu, launch, flow, room, {"matrix": operations / rate / byte_time})
    return Row(
        gpu.name, kernel_name(launch), call.key, CONV_LAYOUT, call.dtype, code.registers, shared,
        code.spills, 0.0, 0, 0, room * threads / gpu.max_threads, matrix,
        " and ".join(missing), work,
    )  # fmt: skip


def read_augment(gpu: Gpu, case: AugmentCase, launch: Launch) -> Row:
    """Returns the properties of an augmentation kernel's machine code.

    Its loads are never 16 bytes wide, because their addresses depend on random values.
    """
    threads = launch.compiled.metadata.num_warps * gpu.target.warp_size
    shared = launch.compiled.metadata.shared
    if gpu.target.backend == "hip":
        amd = amdgcn.read(launch.compiled.asm["amdgcn"])
        registers, spills = amd.registers, amd.spills
    else:
        code = disassemble(launch.compiled.asm["cubin"])
        registers, spills, shared = code.registers, code.spills, shared + RESERVED_SHARED
    room = resident_programs(gpu, registers, shared, threads)
    work = NOT_COUNTED
    if gpu is COUNTED_GPU:
        work = work_of(gpu, launch, flow_of(launch, AUGMENT_TAKEN, RESIZE_TAPS), room)
    return Row(
        gpu.name, kernel_name(launch), str(case), AUGMENT_LAYOUT, "uint8", registers, shared,
        spills, 0.0, 0, 0, room * threads / gpu.max_threads, work=work,
    )  # fmt: skip


def loaded_tensors(launch: Launch) -> int:
    """Counts the activation tensors that a kernel reads."""
    names = ("x_ptr", "dy_ptr", "dy_skip_ptr", "residual_ptr")
    return sum(launch.arguments.get(name) is not None for name in names)


def stores_tensor(launch: Launch) -> bool:
    """Whether a kernel writes an activation tensor."""
    names = ("y_ptr", "dx_ptr", "dz_ptr")
    return any(launch.arguments.get(name) is not None for name in names)


def _amd_row(gpu: Gpu, launch: Launch, case: str, layout: str, dtype: str, threads: int) -> Row:
    """Returns the properties of a kernel's machine code for AMD.

    The loops of the kernel are not analysed, so its loads in flight are not known.
    """
    code = amdgcn.read(launch.compiled.asm["amdgcn"])
    is_conv = "conv" in launch.kernel
    wide = {"load", "store"} if stores_tensor(launch) and not is_conv else {"load"}
    shared = launch.compiled.metadata.shared
    room = resident_programs(gpu, code.registers, shared, threads)
    return Row(
        gpu.name, kernel_name(launch), case, layout, dtype, code.registers, shared, code.spills,
        0.0 if is_finalize(launch) or code.wide >= wide else 1.0, 0, 0,
        room * threads / gpu.max_threads, "MFMA" if code.matrix else "",
        "matrix instructions" if is_conv and not code.matrix else "",
    )  # fmt: skip


def audit(
    gpu: Gpu, cases: list[Case], convs: list[ConvCall], augments: list[AugmentCase]
) -> list[Row]:
    """Returns a row for each specialisation that the cases launch and each size of its tensors."""
    rows: list[Row] = []
    seen: set[tuple[Any, ...]] = set()

    def take(launches: list[Launch], read: Callable[[Launch], Row]) -> None:
        for launch in launches:
            sizes = [t.numel() for t in launch.arguments.values() if isinstance(t, Tensor)]
            key = launch.compiled.hash, launch.grid, *sizes
            if key not in seen:
                seen.add(key)
                rows.append(read(launch))

    for case in cases:
        launches: list[Launch] = []
        with compile_only(gpu, launches.append):
            launch_step(case)
        take(launches, partial(read_row, gpu, case))
    for call in convs:
        launches = []
        with compile_only(gpu, launches.append):
            launch_conv(call)
        take(launches, partial(read_conv, gpu, call))
    for chain in augments:
        launches = []
        with compile_only(gpu, launches.append):
            launch_augment(chain)
        take(launches, partial(read_augment, gpu, chain))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpu", choices=GPUS, required=True)
    parser.add_argument("--families", action="store_true", help="one case for each kernel family")
    options = parser.parse_args()
    cases = family_cases() if options.families else all_cases()
    convs = family_convs() if options.families else all_convs()
    print(
        json.dumps([asdict(row) for row in audit(GPUS[options.gpu], cases, convs, augment_cases())])
    )


if __name__ == "__main__":
    main()
