"""Times launch configurations that differ from `bnres.kernels.config.TUNING` in one field.

Each kernel runs on the activations of the stem and of layer1, in both layouts. A variant is timed
only if its result agrees with that of the current configuration.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import clock
from benchmarks.check import check
from benchmarks.operations import LAYOUTS
from benchmarks.sites import RESNET18_SITES
from bnres.kernels import config, launch
from bnres.kernels.bn_backward import bn_backward_dx, bn_backward_reduce
from bnres.kernels.bn_forward import bn_apply, bn_stats
from bnres.kernels.config import KernelTuning
from bnres.kernels.norm import Norm

BATCH, SMALL_BATCH, SMALL_SIZE = 256, 2, 8
EPS = 1e-5
# Variants sum in different orders, and results are rounded to bf16.
TOLERANCE = 2**-8
ROUNDS, SMALL_ROUNDS = 20, 1
# Number of sets of tensors that calls alternate between, so that none finds its inputs in the L2
# cache.
SETS = 3
CHANGES: dict[str, tuple[Any, ...]] = {
    "num_stages": (1, 2, 3, 4),
    "unroll": (1, 2, 4, 8),
    "programs_per_sm": (2, 3, 4, 5, 6, 8),
    "eviction": ("", "evict_first", "evict_last"),
}
KERNELS = ("stats", "reduce", "dx", "apply")

Call = Callable[[], tuple[Tensor, ...]]


def variants(kernel: str) -> Iterator[tuple[str, KernelTuning]]:
    """Yields the name and value of a kernel's current configuration, then of each variant of it."""
    today = config.TUNING[kernel]
    yield "today", today
    for field, values in CHANGES.items():
        for value in values:
            if value != getattr(today, field):
                yield f"{field}={value}", replace(today, **{field: value})


@contextmanager
def tuned(kernel: str, tuning: KernelTuning) -> Iterator[None]:
    """Launches ``kernel`` with another configuration inside the context."""
    before = config.TUNING[kernel]
    config.TUNING[kernel] = tuning
    launch._plan.cache_clear()
    try:
        yield
    finally:
        config.TUNING[kernel] = before
        launch._plan.cache_clear()


def calls(shape: tuple[int, ...], layout: str, device: torch.device) -> dict[str, Call]:
    """Returns a call of each kernel's launcher for BN+ReLU on random bf16 tensors."""

    def tensor() -> Tensor:
        x = torch.randn(shape, device=device).to(torch.bfloat16)
        return x.contiguous(memory_format=LAYOUTS[layout])

    x, dy = tensor(), tensor()
    weight, bias = torch.rand(2, shape[1], device=device) + 0.5
    norm = Norm(bn_stats(x, None, None, 0.1, EPS), weight, bias)
    backward = (dy, x, norm, None, None, None, "relu", 0.0)
    count = x.numel() // shape[1]
    sums, _ = bn_backward_reduce(*backward)
    return {
        "stats": lambda: bn_stats(x, None, None, 0.1, EPS),
        "reduce": lambda: bn_backward_reduce(*backward)[0][:2],
        "dx": lambda: bn_backward_dx(*backward, sums, count)[:1],
        "apply": lambda: bn_apply(x, norm, None, None, "relu", 0.0)[:1],
    }


def measure(
    kernel: str,
    tuning: KernelTuning,
    calls: Sequence[Call],
    expected: tuple[Tensor, ...],
    moved: int,
) -> float:
    """Returns the median seconds of a kernel with a configuration.

    Args:
        kernel: name of the kernel.
        tuning: configuration of the kernel.
        calls: calls of the kernel, each with other tensors.
        expected: expected result of the first call.
        moved: approximate number of bytes that a call touches.

    Raises:
        WrongResult: if the result of the first call differs from ``expected``.
    """
    ticking = clock.DeviceClock()
    with tuned(kernel, tuning):
        check(kernel, calls[0](), expected, TOLERANCE)
        turns = itertools.cycle(calls)
        device = expected[0].device
        timed = clock.prepare(ticking, lambda: next(turns), device, touched_bytes=moved)
        return median(
            clock.durations(ticking, timed, ROUNDS if expected[0].is_cuda else SMALL_ROUNDS)
        )


def run(out: Path, minutes: float, device: torch.device) -> int:
    """Appends a line for each variant to ``out`` until the time is up; returns how many are left.

    Variants that are already in ``out`` are not measured again. Without a GPU the tensors are
    small.

    Raises:
        torch.AcceleratorError: if a variant has made the GPU unusable; ``out`` has a line for it.
    """
    deadline = time.monotonic() + 60 * minutes
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    done = {json.loads(line)["id"] for line in lines}
    left = 0
    for layout, site in itertools.product(LAYOUTS, RESNET18_SITES[:2]):
        shape = site.shape(BATCH)
        if device.type != "cuda":
            shape = (SMALL_BATCH, 8, SMALL_SIZE, SMALL_SIZE)
        sets, moved = [calls(shape, layout, device) for _ in range(SETS)], 2 * prod(shape)
        for kernel in KERNELS:
            expected = sets[0][kernel]()
            for name, tuning in variants(kernel):
                id = f"{site.name} {layout} {kernel} {name}"
                if id in done:
                    continue
                if time.monotonic() >= deadline:
                    left += 1
                    continue
                row: dict[str, Any] = {"id": id, "kernel": kernel, "variant": name}
                lost = None
                try:
                    row["seconds"] = measure(
                        kernel, tuning, [made[kernel] for made in sets], expected, moved
                    )
                except Exception as error:  # a variant's failure is a result
                    row["failed"] = f"{type(error).__name__}: {error}"[:300]
                    lost = error if isinstance(error, torch.AcceleratorError) else None
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(id, row.get("failed") or f"{row['seconds'] * 1e6:.1f} us", flush=True)
                if lost is not None:
                    raise lost  # this process can't use the GPU any more
    return left
