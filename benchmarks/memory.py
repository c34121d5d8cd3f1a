"""Measures the memory of a training step."""

from collections.abc import Callable

import torch

from benchmarks.models import Work

Grown = tuple[int, int]


def measure(work: Work, device: torch.device) -> dict[str, int]:
    """Measures by how many bytes the allocated memory grows during a training step.

    Returns:
        ``held_bytes`` is the growth at the end of the forward, which is the memory that is kept for
        backward. ``peak_bytes`` is the greatest growth at any time of the step, including gradients
        and workspaces, but not weights and the optimiser's state, which exist before the step.
    """
    work.run()
    work.run()
    work.model.zero_grad(set_to_none=True)
    held, _ = allocated(work.forward, device)
    _, peak = allocated(work.run, device)
    return {"held_bytes": held, "peak_bytes": peak}


def allocated(call: Callable[[], object], device: torch.device) -> Grown:
    """Measures by how many bytes the allocated memory grows during ``call``.

    Returns:
        A tuple of the growth at the end of ``call``, including its result, and the greatest growth
        during ``call``.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        after = torch.cuda.memory_allocated(device) - before
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return after, peak
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = call()
    del result
    grown = peak = 0
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            grown += event.nbytes()
            peak = max(peak, grown)
    return grown, peak
