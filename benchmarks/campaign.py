"""Measures as many cases as the time allows in a child process, and stores each result at once."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks import cost, environment
from benchmarks.cases import Case, ModelCase, groups, site_name
from benchmarks.child import Child, ChildFailed
from benchmarks.measure import fields_of
from benchmarks.store import ENVIRONMENT, Record, ResultStore

# This is the time limit in seconds for describing the device and for measuring its bandwidth and
# its FLOP/s.
OPENING_LIMIT = 120.0
# A case may continue for this many seconds after the campaign's deadline.
GRACE = 10.0


@dataclass(frozen=True)
class Functions:
    """The functions that the child process calls, as import paths of the form ``module:name``.

    Attributes:
        describe: takes a device, as `benchmarks.environment.describe` does.
        measure_ceilings: takes a device, as `benchmarks.environment.measure_ceilings` does.
        measure: takes a case, a device and the ceilings, as `benchmarks.measure.measure` does.
    """

    describe: str = "benchmarks.environment:describe"
    measure_ceilings: str = "benchmarks.environment:measure_ceilings"
    measure: str = "benchmarks.measure:measure"


FUNCTIONS = Functions()


def open_store(
    folder: Path, device: torch.device, child: Child, functions: Functions = FUNCTIONS
) -> ResultStore:
    """Opens a folder of results. If the folder is new, measures the device's ceilings.

    The ceilings are the bandwidth of a copy and the FLOP/s of a matrix product.

    Raises:
        ValueError: if the folder has results of another environment, or can't be read.
        ChildFailed: if the device can't be described, or its ceilings can't be measured.
    """

    def ask(function: str) -> Record:
        answer = child.call(function, device, limit=OPENING_LIMIT)
        if answer.status != "measured":
            raise ChildFailed(f"{function}: {answer.reason}")
        found: Record = answer.value
        return found

    about = ask(functions.describe)
    if not (folder / ENVIRONMENT).exists():
        about["ceilings"] = ask(functions.measure_ceilings)
        about["clocks"] = environment.clocks()  # At this point the GPU is not idle.
    return ResultStore(folder, about)


def run(
    store: ResultStore,
    cases: Sequence[Case],
    deadline: float,
    device: torch.device,
    console: Console,
    child: Child,
    functions: Functions = FUNCTIONS,
    limit_of: Callable[[Case], float] = cost.limit,
) -> int:
    """Measures, in order, the cases that have no result yet. Returns the number of new results.

    Consecutive cases that differ only in their provider are a group. If a group may take longer
    than the remaining time, the whole group is skipped. A short run therefore measures few groups,
    but measures each of them completely. Within a group, a case is skipped if its estimated time
    exceeds the remaining time. A case that the deadline interrupts gets no result.

    Args:
        store: folder that the results are added to.
        cases: cases to measure.
        deadline: time to stop, in seconds of `time.monotonic`.
        device: device to measure on. Only the child process uses it.
        console: prints the progress and the cases that were left out.
        child: process that measures.
        functions: functions that the child calls.
        limit_of: returns the time limit of a case in seconds.

    Raises:
        ChildFailed: if no child can be started.
    """
    costs = cost.Costs(store.records.values())
    waiting = [case for case in cases if case.id not in store.records]
    done = 0
    profiled = False
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=len(waiting))
        for case in costs.fitting(groups(waiting), lambda: deadline - time.monotonic()):
            left = deadline - time.monotonic()
            progress.update(task, description=case.id)
            if (case.suite == "groups") != profiled:
                child.stop()  # A process that has used the profiler must not time anything.
                profiled = not profiled
            start = time.monotonic()
            limit = limit_of(case)
            answer = child.call(
                functions.measure, case, device, store.environment["ceilings"],
                limit=min(limit, left + GRACE),
            )  # fmt: skip
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
            progress.advance(task)
            progress.console.print(describe(record), highlight=False, soft_wrap=True)
    console.print(left_out(cases, store, costs), highlight=False, soft_wrap=True)
    return done


def idle_share(case: Case, record: Record, store: ResultStore) -> Record:
    """Returns as ``idle`` the share of a step's time in which the GPU waits for the host.

    The share is 1 - replay / loop. ``loop`` is the time of the step if the host launches each
    kernel. ``replay`` is the time of the same step if it is replayed from a CUDA graph. A replay
    runs the same kernels without the host, but there are still gaps of about a microsecond between
    them. The result is empty if the case is not a step that the host launches, or if the replay was
    not measured.
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
    if "groups" in record and "median" not in record:
        return f"{record['id']}: {sum(record['groups'].values()) * 1e6:.1f} us of kernel time"
    share = f", {record['share']:.0%} of the limit" if "share" in record else ""
    idle = f", GPU idle {record['idle']:.0%} of the time" if "idle" in record else ""
    note = f"; {record['note']}" if record.get("note") else ""
    return f"{record['id']}: {record['median'] * 1e6:.1f} us{share}{idle}{note}"


def left_out(cases: Sequence[Case], store: ResultStore, costs: cost.Costs) -> str:
    """Lists, by suite and net, the cases without a result and their estimated time.

    The last line says which value of ``--minutes`` is enough for the longest group of these cases.
    """
    missing = [case for case in cases if case.id not in store.records]
    if not missing:
        return "nothing was left out"
    places: dict[str, list[Case]] = {}
    for case in missing:
        places.setdefault(f"{case.suite} {site_name(case).split('.')[0]}", []).append(case)

    def line(name: str, chosen: Sequence[Case]) -> str:
        seconds = sum(costs.seconds(case) for case in chosen)
        time = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        return f"{name}: {len(chosen)} cases, about {time}"

    lines = [line("left out (times are estimates)", missing)]
    for name, chosen in places.items():
        providers = ", ".join(dict.fromkeys(case.provider for case in chosen))
        lines.append(f"  {line(name, chosen)}: {providers}")
    minutes = math.ceil(max(map(costs.most_seconds, groups(missing))) / 60)
    lines.append(
        f"  a group is measured only if there is time for all of it; the largest needs "
        f"--minutes {minutes}"
    )
    return "\n".join(lines)
