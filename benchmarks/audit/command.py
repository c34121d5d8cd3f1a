"""Implements ``python -m benchmarks audit``.

The command compares the memory that operations touch, and the kernels' machine code, with a
recorded budget.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import triton

from benchmarks.audit import budget
from benchmarks.audit.standin import GPUS
from benchmarks.environment import ROOT
from bnres.kernels.interpreter import check_versions


def run(record: bool) -> int:
    """Prints the tables. Returns 1 if a result exceeds its budget, otherwise 0.

    Args:
        record: whether to store the results as the new budget.

    Raises:
        ValueError: if no budget is recorded, or if triton's interpreter does not support the
            installed numpy.
    """
    try:
        check_versions(triton.__version__, version("numpy"))
    except ImportError as error:  # memory is counted in the interpreter
        raise ValueError(str(error)) from error
    limits, recorded_triton = (None, "") if record else budget.load()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        code = [pool.submit(_worker, "machine_code", name) for name in GPUS]
        memory = pool.submit(_worker, "memory", TRITON_INTERPRET="1")
        rows = [row for future in code for row in future.result()]
        found = budget.Found(**memory.result(), kernels=budget.worst(rows))
    print(memory_table(found))
    print()
    print(kernel_table(found.kernels))
    if limits is None:
        budget.record(found)
        print(f"\nrecorded in {budget.PATH}")
        return 0
    problems = budget.exceeded(found, limits, recorded_triton == triton.__version__)
    print("\n" + "\n".join(problems or ["all results are within the recorded budget"]))
    return int(bool(problems))


def _worker(module: str, *arguments: str, **environment: str) -> Any:
    """Runs an audit in a new process and returns its results.

    Some audits use triton's interpreter and some its compiler, and a process can't use both.
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
    """Formats the memory that operations touch, and the bytes and launches of a net.

    CONTRIBUTING.md explains the columns.
    """
    lines = [
        f"{'operation':22} {'step':9} {'layout':14} "
        f"{'lanes, S':>9} {'sectors, S':>11} {'floor, S':>9}"
    ]
    lines += [
        f"{r['operation']:22} {r['step']:9} {r['layout']:14} "
        f"{r['lanes']:9.3f} {r['sectors']:11.3f} {r['floor']:9.4g}"
        for r in found.memory
    ]
    moved, held = (
        ", ".join(f"{kind} {size / 1e6:,.0f} MB" for kind, size in sizes.items())
        for sizes in (found.traffic, found.held)
    )
    launches = ", ".join(f"{kind} {count}" for kind, count in found.launches.items())
    lines += [
        f"moved without the convolutions, ResNet-18, batch 256, bf16: {moved}",
        f"held for backward, ResNet-18, batch 256, bf16: {held}",
        f"launches of a training step, ResNet-18: {launches}",
    ]
    return "\n".join(lines)


def kernel_table(rows: Sequence[budget.Row]) -> str:
    """Formats the properties of the kernels' machine code. CONTRIBUTING.md explains the columns."""
    lines = [
        f"{'gpu':6} {'kernel':29} {'layout':13} {'dtype':8} {'regs':>4} {'spills':>6} "
        f"{'calls':>5} {'flight':>6} {'/elem':>6} {'share':>5}  at"
    ]
    lines += [
        f"{r['gpu']:6} {r['kernel'].replace('_kernel', ''):29} {r['layout']:13} {r['dtype']:8} "
        f"{r['registers']:4} {r['spills']:6} {_or_dash(r['calls'], ''):>5} "
        f"{_or_dash(r['in_flight'], '.0%'):>6} {_or_dash(r['per_element'], '.1f'):>6} "
        f"{_or_dash(r['share'], '.2f'):>5}  {r['at']}"
        f"{' no ' + r['missing'] if r['missing'] else ''}"
        for r in rows
    ]
    return "\n".join(lines)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
