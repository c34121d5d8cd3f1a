"""A stand-in for `benchmarks.measure.measure` in tests of campaigns.

The batch size of a case selects what happens when the case is measured. For example, the batch size
``RAISES`` makes `measure` raise an error.
"""

import os
import sys
import time

import torch

from benchmarks.check import WrongResult
from benchmarks.providers.base import Unavailable

FINE, RAISES, HANGS, ABORTS, EXITS, OUT_OF_MEMORY, CAPTURES, SKIPPED, REFUSED = range(2, 11)


def hang():
    time.sleep(600)


def fail(error):
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


def measure_ceilings(device):
    return {"copy": 1e9, "product": 1e12}


def measure(case, device, ceilings):
    """Calls the function that ``DEEDS`` has for the case's batch size. Returns made-up values."""
    DEEDS[case.batch]()
    return {"median": 1.0, "pid": os.getpid(), "copy": ceilings["copy"]}
