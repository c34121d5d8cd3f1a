"""Functions that replace the measurements of `benchmarks.campaign` in tests and rehearsals.

The batch size of a case selects what happens, by the table `DEEDS`. The timings are made up.
"""

import os
import sys
import time
from typing import Any, NoReturn

import torch

from benchmarks.cases import Case
from benchmarks.check import WrongResult
from benchmarks.providers.base import Unavailable
from benchmarks.store import MADE_UP

FINE, RAISES, HANGS, ABORTS, EXITS, OUT_OF_MEMORY, CAPTURES, SKIPPED, REFUSED = range(2, 11)
# The keys are batch sizes, and the values are the expected statuses. For all other batch sizes the
# expected status is ``failed``.
OTHER_STATUS = {FINE: "measured", SKIPPED: "skipped", REFUSED: "refused"}


def hang() -> None:
    time.sleep(600)


def fail(error: Exception) -> NoReturn:
    raise error


DEEDS = {
    FINE: lambda: None,
    RAISES: lambda: fail(RuntimeError("broken")),
    HANGS: hang,
    ABORTS: os.abort,
    EXITS: lambda: sys.exit(3),
    OUT_OF_MEMORY: lambda: fail(torch.OutOfMemoryError("no memory")),
    CAPTURES: lambda: fail(RuntimeError("operation not permitted when stream is capturing")),
    SKIPPED: lambda: fail(Unavailable("not here")),
    REFUSED: lambda: fail(WrongResult("wrong")),
}


def describe(device: torch.device) -> dict[str, Any]:
    versions = dict.fromkeys(("torch", "triton", "bnres", "commit", "backend"), "none")
    return {"device": MADE_UP, "date": "2000-01-01T00:00:00Z", **versions}


def measure_ceilings(device: torch.device) -> dict[str, float]:
    return {"copy": 1e9, "product": 1e12}


def measure(case: Case, device: torch.device, ceilings: dict[str, float]) -> dict[str, Any]:
    """Does what the case's batch size selects. Returns made-up values of the record's fields."""
    DEEDS[case.batch]()
    if case.suite == "groups":
        groups = {"convolution": 0.5, "batch norm": 0.3, "pooling": 0.1, "other": 0.1}
        return {"groups": groups, "pid": os.getpid()}
    size = {"peak_bytes": 2_000_000, "held_bytes": 1_000_000} if case.suite == "memory" else {}
    return {
        "median": 1.0, "q1": 0.9, "q3": 1.1, "images": case.batch, "share": 0.5, "note": "",
        "host_seconds": 0.1, "method": "events", "timed_dtype": case.dtype, "pid": os.getpid(),
        "copy": ceilings["copy"], **size,
    }  # fmt: skip
