"""Measures cases in a child process until the time is up, and stores each result immediately."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import cost, environment
from benchmarks.cases import Case, ModelCase, groups
from benchmarks.child import Child, ChildFailed
from benchmarks.measure import fields_of
from benchmarks.store import ENVIRONMENT, Record, ResultStore

# The time limit in seconds of each call that `open_store` makes.
OPENING_LIMIT = 120.0
# A case may continue for this many seconds after the campaign's deadline.
GRACE = 10.0


def open_store(
    folder: Path,
    device: torch.device,
    child: Child,
    measure_ceilings: str = "benchmarks.environment:measure_ceilings",
) -> ResultStore:
    """Opens a folder of results. If the folder is new, the device's ceilings are measured first.

    The ceilings are the bandwidth of a copy and the FLOP/s of a matrix product.

    Args:
        folder: folder of the results.
        device: device to describe and to measure. Only the child process uses it.
        child: process that describes and measures the device.
        measure_ceilings: import path of the function that measures the ceilings.

    Raises:
        ValueError: if the folder's results are from a different environment, or if the folder can't
            be read.
        ChildFailed: if the device can't be described, or its ceilings can't be measured.
    """

    def ask(function: str) -> Record:
        answer = child.call(function, device, limit=OPENING_LIMIT)
        if answer.status != "measured":
            raise ChildFailed(f"{function}: {answer.reason}")
        found: Record = answer.value
        return found

    about = ask("benchmarks.environment:describe")
    if not (folder / ENVIRONMENT).exists():
        about["ceilings"] = ask(measure_ceilings)
        # The clock rates are read after the GPU was busy, because an idle GPU lowers them.
        about["clocks"] = environment.clocks()
    return ResultStore(folder, about)


def run(
    store: ResultStore,
    cases: Sequence[Case],
    deadline: float,
    device: torch.device,
    echo: Callable[[str], object],
    child: Child,
    measure: str = "benchmarks.measure:measure",
    limit_of: Callable[[Case], float] = cost.limit,
) -> int:
    """Measures, in order, the cases that have no result yet. Returns the number of new results.

    Consecutive cases that differ only in their provider are a group. A group is skipped if its
    estimated time exceeds the remaining time. The same rule applies to each case of a group that is
    not skipped. A case that is interrupted after the deadline gets no result.

    Args:
        store: folder to which the results are added.
        cases: cases to measure.
        deadline: value of `time.monotonic` at which to stop.
        device: device to measure on. Only the child process uses it.
        echo: called with a line for each result.
        child: process that measures the cases.
        measure: import path of the function that the child calls for each case.
        limit_of: returns the time limit of a case in seconds.

    Raises:
        ChildFailed: if no child can be started.
    """
    costs = cost.Costs(store.records.values())
    waiting = [case for case in cases if case.id not in store.records]
    done = 0
    for case in costs.fitting(groups(waiting), lambda: deadline - time.monotonic()):
        left = deadline - time.monotonic()
        start = time.monotonic()
        limit = limit_of(case)
        answer = child.call(
            measure, case, device, store.environment["ceilings"], limit=min(limit, left + GRACE)
        )
        if answer.timed_out and limit > left + GRACE:
            break
        record = fields_of(case) | {
            "status": answer.status, "wall_seconds": time.monotonic() - start,
        }  # fmt: skip
        record |= answer.value if answer.status == "measured" else {"reason": answer.reason}
        record |= idle_share(case, record, store)
        store.add(record)
        costs.note(record)
        done += 1
        echo(describe(record))
    return done


def idle_share(case: Case, record: Record, store: ResultStore) -> Record:
    """Returns ``idle``, the share of a training step's time in which the GPU waits for the host.

    The share is max(1 - replay / loop, 0). ``loop`` is the time of a step whose kernels the host
    launches. ``replay`` is the time of the step in a CUDA graph, where the GPU does not wait for
    the host.

    The result is empty if ``case`` is not a step whose kernels the host launches, or if the step
    was not measured in a CUDA graph.
    """
    if not isinstance(case, ModelCase) or case.suite != "step" or record.get("method") != "loop":
        return {}
    graph = store.records.get(replace(case, launch="graph").id)
    if graph is None or graph["status"] != "measured":
        return {}
    return {"idle": max(1 - graph["median"] / record["median"], 0.0)}


def describe(record: Record) -> str:
    """Describes a record in one line."""
    if record["status"] != "measured":
        return f"{record['id']}: {record['status']}: {record['reason'].splitlines()[0]}"
    if "peak_bytes" in record:
        return f"{record['id']}: peak memory {record['peak_bytes'] / 1e6:.1f} MB"
    share = f", {record['share']:.0%} of the possible speed" if "share" in record else ""
    idle = f", GPU idle {record['idle']:.0%} of the time" if "idle" in record else ""
    note = f"; {record['note']}" if record.get("note") else ""
    return f"{record['id']}: {record['median'] * 1e6:.1f} us{share}{idle}{note}"


def left_out(cases: Sequence[Case], store: ResultStore) -> str:
    """Says how many cases have no result, and how many minutes they are estimated to need."""
    missing = [case for case in cases if case.id not in store.records]
    if not missing:
        return "0 left"
    costs = cost.Costs(store.records.values())
    total = math.ceil(sum(map(costs.seconds, missing)) / 60)
    largest = math.ceil(max(map(costs.most_seconds, groups(missing))) / 60)
    return (
        f"{len(missing)} left, about {total} min; the largest group of cases needs "
        f"--minutes {largest}"
    )
