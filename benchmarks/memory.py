"""Measures the memory of a training step."""

from collections.abc import Callable

import torch

from benchmarks.models import Work

Grown = tuple[int, int]


def measure(work: Work, device: torch.device) -> dict[str, int]:
    """Measures by how many bytes the allocated memory grows during a step.

    Returns:
        ``held_bytes``, which is the growth during the forward that is held for backward; and
        ``peak_bytes``, the greatest growth during a step. Gradients and workspaces are included,
        the weights and the optimiser's state are not.
    """
    work.run()
    work.run()
    work.model.zero_grad(set_to_none=True)
    held, _ = allocated(work.forward, device)
    _, peak = allocated(work.run, device)
    return {"held_bytes": held, "peak_bytes": peak}


def allocated(call: Callable[[], object], device: torch.device) -> Grown:
    """Returns by how many bytes the allocated memory grows during ``call``.

    Returns:
        The growth when ``call`` has returned and its result is alive, and the greatest growth.
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
