"""What a campaign's child does in the tests in place of measuring; the case's batch says what."""

import os
import sys
import time

import torch

from benchmarks.check import WrongResult
from benchmarks.providers.base import Unavailable

FINE, RAISES, HANGS, ABORTS, EXITS, OUT_OF_MEMORY, CAPTURES, SKIPPED, REFUSED = range(2, 11)


def hang() -> None:
    time.sleep(600)


def fail(error: Exception) -> None:
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


def measure(case, device, ceilings):
    DEEDS[case.batch]()
    return {"median": 1.0, "pid": os.getpid(), "copy": ceilings["copy"]}


def measure_ceilings(device):
    return {"copy": 1e9, "product": 1e12}
