"""Whether something else runs on the host, told by the ruler of ``python -m benchmarks host``."""

import time

import torch

from benchmarks.audit.host import CALLS, Timed, ruler

SECONDS = 0.5
# The mean of the ruler's spans over the shortest. With nine busy processes on two cores it was 1.6 to 2.2,
# and by the thread's CPU time, which leaves out the waiting, 1.07 to 1.11.
MOST_SPREAD = 1.25


def spread(timed: Timed | None = None, seconds: float = SECONDS) -> float:
    """How many times as long as the shortest span the mean is, by the clock on the wall.

    Args:
        timed: what is timed; the ruler's forward if None, which leaves the GPU alone.
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
            for _ in range(CALLS):
                timed.call()
            spans.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return sum(spans) / len(spans) / min(spans)


def warning(found: float) -> str | None:
    """What a user is told about a spread, or None."""
    if found <= MOST_SPREAD:
        return None
    return (
        f"warning: the host is busy: calls of torch's batch norm take {found:.2f} times their shortest "
        f"time on average, the limit is {MOST_SPREAD:.2f}; what the host does will be measured too "
        "slow, so stop other programs and run it again in a new folder"
    )
