"""Times the kernels with the configurations in `bnres.kernels.config.TUNING`, and with others.

Each kernel runs in bfloat16, in both layouts, on tensors of one shape for each stage of ResNet-18.
Pooling runs only on the shape of the stem.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.check import check
from benchmarks.operations import LAYOUTS
from benchmarks.sites import RESNET18_SITES
from bnres.kernels import config, launch
from bnres.kernels.bn_backward import bn_backward_dx, bn_backward_reduce
from bnres.kernels.bn_forward import bn_apply, bn_stats
from bnres.kernels.bn_max_pool import bn_max_pool, bn_max_pool_backward_dx
from bnres.kernels.config import KernelTuning
from bnres.kernels.norm import Norm, Statistics
from bnres.kernels.outputs import empty_mask

BATCH, SMALL_BATCH, SMALL_SIZE = 256, 2, 16
EPS = 1e-5
# The greatest allowed relative difference between the results of two configurations. They sum in
# different orders and round the results to bf16.
TOLERANCE = 2**-8
# A CUDA graph contains at least CALLS calls of a kernel. Its replay is timed REPLAYS times.
CALLS, REPLAYS = 16, 5
# Consecutive calls use different sets of tensors, so that no call finds its inputs in the L2 cache.
# Together, the tensors x of all sets are at least this many times as large as the cache.
COLD_FACTOR = 3
# Every kernel is tried with these values of num_stages.
STAGES = (1, 2, 3, 4, 5)
# For each kernel: the values of unroll and the values of programs_per_sm that are tried.
GRIDS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "stats": ((4, 8), (1, 2, 3, 4, 5)),
    "apply": ((4,), (6, 8, 12, 16, 20, 24, 32)),
    "apply_residual": ((4,), (4, 8, 12, 16, 20, 24)),
    "apply_two_norms": ((2, 4), (3, 4, 6, 8, 12)),
    "reduce": ((4,), (1, 2, 3, 4, 5)),
    "reduce_two_norms": ((2,), (1, 2, 3, 4)),
    "dx": ((4,), (4, 6, 8, 12, 16, 20)),
    "dx_two_norms": ((2,), (3, 4, 6, 8, 12)),
    "pool": ((1,), (3, 4, 5, 6, 8, 10)),
    "pool_dx": ((1,), (3, 4, 6, 8, 10)),
}

Call = Callable[[], Sequence[Tensor | None]]


def variants(kernel: str) -> Iterator[KernelTuning]:
    """Yields a kernel's current configuration, then the others from ``STAGES`` and ``GRIDS``."""
    today = config.TUNING[kernel]
    yield today
    for stages, unroll, programs in itertools.product(STAGES, *GRIDS[kernel]):
        tuning = replace(today, num_stages=stages, unroll=unroll, programs_per_sm=programs)
        if tuning != today:
            yield tuning


@contextmanager
def tuned(kernel: str, tuning: KernelTuning) -> Iterator[None]:
    """Makes ``tuning`` the configuration of ``kernel`` inside a ``with`` block."""
    before = config.TUNING[kernel]
    plans = launch._plan, launch._plan_columns
    config.TUNING[kernel] = tuning
    for plan in plans:
        plan.cache_clear()
    try:
        yield
    finally:
        config.TUNING[kernel] = before
        for plan in plans:
            plan.cache_clear()


def calls(shape: tuple[int, ...], layout: str, device: torch.device) -> dict[str, Call]:
    """Returns for each kernel a call of its launcher on random bf16 tensors.

    A call returns tensors that it has written. Only ``reduce`` and ``reduce_two_norms`` allocate
    new tensors in each call.
    """

    def tensor(shape: Sequence[int] = shape) -> Tensor:
        x = torch.randn(shape, device=device).to(torch.bfloat16)
        return x.contiguous(memory_format=LAYOUTS[layout])

    x, residual, dy = tensor(), tensor(), tensor()
    y, dx, mask = torch.empty_like(x), torch.empty_like(x), empty_mask(x)
    weight, bias = torch.rand(2, shape[1], device=device) + 0.5
    statistics = Statistics(*torch.empty(2, shape[1], device=device))
    norm, other = (Norm(bn_stats(t, None, None, 0.1, EPS), weight, bias) for t in (x, residual))
    plain = (dy, x, norm, None, None, None, "relu", 0.0)
    two = (dy, x, norm, residual, other, None, "relu", 0.0)
    count = x.numel() // shape[1]
    sums, two_sums = (bn_backward_reduce(*given)[0] for given in (plain, two))
    pooled, argmax, x_max = bn_max_pool(x, norm, "relu", 0.0, save=True)
    assert argmax is not None
    dpooled = tensor(pooled.shape)
    act = ("relu", 0.0)
    return {
        "stats": lambda: bn_stats(x, None, None, 0.1, EPS, out=statistics),
        "apply": lambda: bn_apply(x, norm, None, None, *act, out=(y, None)),
        "apply_residual": lambda: bn_apply(x, norm, residual, None, *act, out=(y, mask))[:1],
        "apply_two_norms": lambda: bn_apply(x, norm, residual, other, *act, out=(y, None)),
        "reduce": lambda: bn_backward_reduce(*plain)[0],
        "reduce_two_norms": lambda: bn_backward_reduce(*two)[0],
        "dx": lambda: bn_backward_dx(*plain, sums, count, out=(dx, None)),
        "dx_two_norms": lambda: bn_backward_dx(*two, two_sums, count, out=(dx, y)),
        "pool": lambda: bn_max_pool(x, norm, *act, out=(pooled, argmax, x_max))[:1],
        "pool_dx": lambda: [
            bn_max_pool_backward_dx(dpooled, argmax, x, norm, *act, sums, count, out=dx)
        ],
    }


def seconds(calls: Sequence[Call]) -> float:
    """Returns the mean seconds of the calls in the fastest of several replays of a CUDA graph.

    Without a GPU, the first call is timed once.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    graph, found = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(REPLAYS + 1):  # The first replay is a warm-up.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return min(found[1:])


def measure(kernel: str, sets: Sequence[dict[str, Call]], tuning: KernelTuning) -> float:
    """Returns the mean seconds of a kernel's calls with a configuration.

    Raises:
        WrongResult: if the result differs from the result of the current configuration.
    """
    call = sets[0][kernel]
    expected = [t.clone() for t in call() if t is not None]
    with tuned(kernel, tuning):
        check(kernel, [t for t in call() if t is not None], expected, TOLERANCE)
        turns = itertools.cycle(made[kernel] for made in sets)
        return seconds([next(turns) for _ in range(max(CALLS, len(sets)))])


def run(out: Path, minutes: float, device: torch.device) -> int:
    """Appends a line for each configuration to ``out`` until the time is up.

    Configurations that are already in ``out`` are not measured again. Without a GPU the tensors are
    small. Returns how many configurations are left.

    Raises:
        torch.AcceleratorError: if a configuration has made the GPU unusable. The next run leaves
            this configuration out.
    """
    deadline = time.monotonic() + 60 * minutes
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    done = {json.loads(line)["id"] for line in lines}
    left = 0
    # All sites of a stage have the same size, so the first one is used.
    sites = {site.name: site for site in reversed(RESNET18_SITES)}
    for layout, (name, site) in itertools.product(LAYOUTS, reversed(sites.items())):
        shape, count = site.shape(BATCH), 1
        if device.type == "cuda":
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            count = max(2, -(-COLD_FACTOR * l2 // (2 * prod(shape))))
        else:
            shape = (SMALL_BATCH, 8, SMALL_SIZE, SMALL_SIZE)
        sets = [calls(shape, layout, device) for _ in range(count)]
        for kernel in GRIDS:
            if kernel.startswith("pool") and name != "stem":
                continue
            for tuning in variants(kernel):
                row: dict[str, Any] = {
                    "id": f"{name} {layout} {kernel} {' '.join(map(str, astuple(tuning)))}",
                    "current": tuning == config.TUNING[kernel],
                }
                if row["id"] in done:
                    continue
                if time.monotonic() >= deadline:
                    left += 1
                    continue
                lost = None
                try:
                    row["seconds"] = measure(kernel, sets, tuning)
                except Exception as error:  # a configuration's failure is a result
                    row["failed"] = f"{type(error).__name__}: {error}"[:300]
                    lost = error if isinstance(error, torch.AcceleratorError) else None
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(row["id"], row.get("failed") or f"{row['seconds'] * 1e6:.1f} us", flush=True)
                if lost is not None:
                    raise lost  # this process can't use the GPU any more
    return left
