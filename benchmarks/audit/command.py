"""Implements ``python -m benchmarks audit``, which compares all audits with the recorded budget."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import triton

from benchmarks.audit import budget
from benchmarks.environment import ROOT
from bnres.files import write_text
from bnres.kernels.interpreter import check_versions

# These are the arguments of the machine-code audit for each GPU. For sm_90 all launches of a step
# are compiled. For the other GPUs one case of each family of kernels is compiled.
GPUS = {
    "sm_90": ["--gpu", "sm_90"],
    "sm_80": ["--gpu", "sm_80", "--families"],
    "sm_100": ["--gpu", "sm_100", "--families"],
    "gfx942": ["--gpu", "gfx942", "--families"],
}


def run(gpus: Sequence[str], json_path: Path | None, record: bool) -> int:
    """Prints the tables. Returns 1 if a result exceeds its budget, otherwise 0.

    Args:
        gpus: names from `GPUS`. The machine code for these GPUs is audited, or for all GPUs if
            there are no names. The counts of memory do not depend on the GPU.
        json_path: file for the results. It includes a row for each specialisation.
        record: whether to store the results as the new budget.

    Raises:
        ValueError: if a GPU is unknown, if ``record`` is given with a choice of GPUs, if no budget
            is recorded, or if triton's interpreter does not support the installed numpy.
    """
    for name in gpus:
        if name not in GPUS:
            raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    if record and gpus:
        raise ValueError(f"record needs all GPUs, got gpu {', '.join(gpus)}")
    try:
        check_versions(triton.__version__, version("numpy"))
    except ImportError as error:  # The interpreter, which counts memory, can't be imported.
        raise ValueError(str(error)) from error
    limits = None if record else budget.load()
    names = list(gpus) or list(GPUS)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(names) + 1)) as pool:
        code = [pool.submit(_worker, "machine_code", GPUS[name]) for name in names]
        memory = pool.submit(_worker, "memory", [], TRITON_INTERPRET="1")
        rows = [row for future in code for row in future.result()]
        counted = memory.result()
    found = budget.Found(counted.pop("rows"), kernels=budget.worst(rows), **counted)
    if json_path is not None:
        content = found.as_json() | {"specialisations": rows}
        write_text(json_path, json.dumps(content, indent=1) + "\n")
    print(memory_table(found))
    print()
    print(kernel_table(found.kernels))
    print()
    print(instruction_table(found.kernels))
    if limits is None:
        budget.record(found)
        print(f"\nrecorded in {budget.PATH}")
        return 0
    problems = budget.exceeded(found, limits, budget.recorded_triton() == triton.__version__)
    print("\n" + "\n".join(problems or ["all results are within the recorded budget"]))
    return int(bool(problems))


def _worker(module: str, arguments: Sequence[str], **environment: str) -> Any:
    """Runs an audit in a new process.

    Some audits use triton's interpreter and others use its compiler. A process can't use both.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.audit.{module}", *arguments],
        cwd=ROOT, env=inherited | environment, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"benchmarks.audit.{module} failed:\n{result.stderr}")
    return json.loads(result.stdout)


def memory_table(found: budget.Found) -> str:
    """Formats the memory that operations touch, and a training step's bytes and launches.

    The unit of the memory is S, the size of one activation tensor.
    """
    lines = [
        f"{'operation':18} {'step':9} {'layout':14} "
        f"{'lanes, S':>9} {'sectors, S':>11} {'floor, S':>9}"
    ]
    lines += [
        f"{r['operation']:18} {r['step']:9} {r['layout']:14} "
        f"{r['lanes']:9.3f} {r['sectors']:11.3f} {r['floor']:9.4g}"
        for r in found.memory
    ]
    moved, held = (
        ", ".join(f"{kind} {size / 1e6:,.0f} MB" for kind, size in sizes.items())
        for sizes in (found.traffic, found.held)
    )
    launches = ", ".join(f"{kind} {count}" for kind, count in found.launches.items())
    lines += [
        f"moved by a training step without its convolutions, ResNet-18, batch 256, bf16: {moved}",
        f"held for backward, ResNet-18, batch 256, bf16: {held}",
        f"launches of a training step, ResNet-18: {launches}",
    ]
    return "\n".join(lines)


def kernel_table(rows: Sequence[budget.Row]) -> str:
    """Formats the properties of the kernels' machine code.

    Each row has the worst values of ``n`` specialisations of a kernel. ``narrow`` is the number of
    bytes that accesses of less than 16 bytes move, divided by the number of bytes that accesses of
    16 bytes move. ``flight`` is the number of bytes of loads that a multiprocessor has in flight,
    divided by the number that hides the latency of memory. ``occup`` is the occupancy.
    """
    lines = [
        f"{_names('gpu', 'kernel', 'layout', 'dtype')} {'n':>3} {'regs':>4} {'smem':>6} "
        f"{'spills':>6} {'narrow':>7} {'flight':>6} {'occup':>5}  {'matrix':6} missing"
    ]
    lines += [
        f"{_names_of(r)} {r['specialisations']:3} {r['registers']:4} {r['shared_memory']:6} "
        f"{r['spills']:6} {r['narrow']:7.3f} "
        f"{'-' if r['in_flight'] is None else format(r['in_flight'], '.0%'):>6} "
        f"{r['occupancy']:5.0%}  {r['matrix']:6} {r['missing']}"
        for r in rows
    ]
    return "\n".join(lines)


def instruction_table(rows: Sequence[budget.Row]) -> str:
    """Formats the instructions that each kernel executes at batch 256, for its worst launch.

    ``/elem`` is the number of instructions that threads execute, for each element of the largest
    tensor. ``share`` is the time to issue the instructions divided by the time to move the bytes. A
    kernel whose share is above 1 can't reach the bandwidth, and a kernel whose share is above 0.5
    may not reach it. ``calls`` is the number of subroutine calls inside loops, ``bound`` is an
    estimate of what limits the time, and ``at`` describes the launch.
    """
    lines = [
        f"{_names('gpu', 'kernel', 'layout', 'dtype')} {'/elem':>7} {'share':>6} {'calls':>5}  "
        f"{'bound':15} at"
    ]
    lines += [
        f"{_names_of(r)} {r['per_element']:7.1f} {r['share']:6.2f} {r['calls']:5}  {r['bound']:15} "
        f"{' '.join(r['at'].split()[:2])}"
        for r in rows
        if r["share"] is not None
    ]
    lines += [
        f"goal: a share of at most {budget.WANTED_SHARE} and no calls in loops; missed by",
        *(budget.unwanted(rows) or ["none"]),
    ]
    return "\n".join(lines)


def _names(gpu: str, kernel: str, layout: str, dtype: str) -> str:
    return f"{gpu:6} {kernel.replace('_kernel', ''):29} {layout:13} {dtype:8}"


def _names_of(row: budget.Row) -> str:
    return _names(row["gpu"], row["kernel"], row["layout"], row["dtype"])
