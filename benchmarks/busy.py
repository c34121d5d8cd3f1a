"""Detects other programs that keep the host busy, by timing calls of torch's batch norm."""

import time

import torch

from benchmarks.audit.host import Timed, ruler

SECONDS = 0.5
# The host is busy if `spread` returns more than this number. With nine busy processes on two cores,
# `spread` returned 1.6 to 2.2. The same ratio of CPU times, which don't include the time that a
# thread waits for a core, was only 1.07 to 1.11.
MOST_SPREAD = 1.25


def spread(timed: Timed | None = None, seconds: float = SECONDS) -> float:
    """Returns the mean wall time of a group of calls, divided by the shortest wall time of a group.

    A group is ``timed.calls`` consecutive calls.

    Args:
        timed: call to time. The default is the forward of torch's batch norm and ReLU on the CPU.
        seconds: how long to time groups.
    """
    if timed is None:
        timed = next(one for one in ruler() if one.kind == "forward")
    timed.module.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # otherwise a call waits until its slowest thread gets a core
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
    """Returns a warning if ``found``, a result of `spread`, exceeds ``MOST_SPREAD``, else None."""
    if found <= MOST_SPREAD:
        return None
    return (
        "warning: the host is busy: on average, calls of torch's batch norm take "
        f"{found:.2f} times their shortest time (the limit is {MOST_SPREAD:.2f}), so host times "
        "will be too long; stop other programs and run this command again with a new folder"
    )
