"""Detects other programs that keep the host busy, by the ruler of ``python -m benchmarks host``."""

import time

import torch

from benchmarks.audit.host import Timed, ruler

SECONDS = 0.5
# With nine busy processes on two cores the spread was 1.6 to 2.2. By the thread's CPU time, which leaves
# out the waiting, it was 1.07 to 1.11.
MOST_SPREAD = 1.25


def spread(timed: Timed | None = None, seconds: float = SECONDS) -> float:
    """The mean of the spans divided by the shortest, by wall time.

    Args:
        timed: what is timed; by default the ruler's forward, which runs on the CPU.
        seconds: to spend.
    """
    if timed is None:
        timed = next(one for one in ruler() if one.kind == "forward")
    timed.module.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of several, one may wait for the others in every call
    try:
        timed.call()
        spans = []
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            for _ in range(timed.calls):
                timed.call()
            spans.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return sum(spans) / len(spans) / min(spans)


def warning(found: float) -> str | None:
    """The warning for a spread, or None if it is small."""
    if found <= MOST_SPREAD:
        return None
    return (
        f"warning: the host is busy: on average, calls of torch's batch norm take {found:.2f} times "
        f"their shortest time (the limit is {MOST_SPREAD:.2f}), so host times will be too long; stop "
        "other programs and run it again in a new folder"
    )
