"""Measures as many cases as the time allows, each written down before the next begins."""

import gc
import time
from collections.abc import Callable, Sequence
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

from benchmarks import clock, environment
from benchmarks.cases import Case
from benchmarks.check import WrongResult
from benchmarks.measure import fields_of, measure
from benchmarks.providers.base import Unavailable
from benchmarks.store import Record, ResultStore

Measure = Callable[[Case], Record]
# A reason longer than this is the trace of a compiler.
REASON_LENGTH = 500


class DeviceLost(Exception):
    """The GPU answers nothing any more in this process."""


def attempt(case: Case, measure_case: Measure) -> Record:
    """The record of a case, whatever becomes of it.

    Its ``status`` is ``measured``, ``skipped`` (the provider is missing here), ``refused`` (it
    computes something else) or ``failed``, with a ``reason``.
    """
    record = fields_of(case)
    try:
        return record | {"status": "measured"} | measure_case(case)
    except Unavailable as error:
        return record | {"status": "skipped", "reason": str(error)}
    except WrongResult as error:
        return record | {"status": "refused", "reason": str(error)}
    except Exception as error:  # one provider's failure is a result, and no reason to stop
        reason = f"{type(error).__name__}: {error}"[:REASON_LENGTH]
        return record | {"status": "failed", "reason": reason}


def open_store(folder: Path, device: torch.device) -> ResultStore:
    """The folder's results; in a new one the ceilings are measured first.

    Raises:
        ValueError: as `ResultStore`.
    """
    about = environment.describe(device)
    if not (folder / "environment.json").exists():
        about["ceilings"] = environment.measure_ceilings(device)
        about["clocks"] = environment.clocks()  # of a GPU at work
    return ResultStore(folder, about)


def run(
    store: ResultStore,
    cases: Sequence[Case],
    minutes: float,
    device: torch.device,
    console: Console,
    measure_case: Measure | None = None,
) -> int:
    """Measures cases that the store lacks until the time is up; returns how many it did.

    Raises:
        DeviceLost: after an error that leaves the GPU's context unusable; the case is recorded.
    """
    ticking = clock.DeviceClock()
    ceilings = store.environment["ceilings"]
    measure_case = measure_case or (lambda case: measure(case, device, ticking, ceilings))
    waiting = [case for case in cases if case.id not in store.done]
    deadline = time.monotonic() + 60 * minutes
    done = 0
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=len(waiting))
        for case in waiting:
            if time.monotonic() >= deadline:
                break
            progress.update(task, description=case.id)
            record = attempt(case, measure_case)
            store.add(record)
            done += 1
            progress.advance(task)
            progress.console.print(describe(record), highlight=False, soft_wrap=True)
            _release(device)
    return done


def describe(record: Record) -> str:
    """A record in one line."""
    if record["status"] != "measured":
        return f"{record['id']}: {record['status']}: {record['reason'].splitlines()[0]}"
    if "peak_bytes" in record:
        return f"{record['id']}: {record['peak_bytes'] / 1e6:.1f} MB at its peak"
    share = f", {record['share']:.0%} of the limit" if "share" in record else ""
    note = f"; {record['note']}" if record.get("note") else ""
    return f"{record['id']}: {record['median'] * 1e6:.1f} us{share}{note}"


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error).splitlines()[0]) from error
