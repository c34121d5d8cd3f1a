"""Measures, without a GPU, the CPU time of calls relative to torch's batch norm and ReLU.

The time is that of the calling thread. It includes Python, torch's dispatcher and autograd, the
allocation of outputs, and each launch up to the call of the GPU's driver. Our kernels are compiled
for a GPU, but launching them does nothing. torch's own operations run on the CPU, on tiny tensors.
Convolutions compute nothing, both in our layers and in torch's.

Each call is timed in many short spans. Just before each span, torch's batch norm and ReLU are
timed. The call's ratio is the median of (time of the call) / (time of torch's batch norm and ReLU).
If the core becomes slower, both times grow, so the ratio depends little on the machine. `LIMITS`
contains the greatest allowed ratios.
"""

import gc
import operator
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from triton.compiler import CompiledKernel

from benchmarks.audit.convolution import convolutions_compute_nothing
from benchmarks.audit.standin import SM90, StandInDriver
from bnres import fuse, use_backend
from bnres.models import resnet18
from bnres.nn import BatchNormAct2d, BatchNormActMaxPool2d, ConvBatchNormAct2d

# Each call is timed in ROUNDS rounds of SPANS spans. In a span the call is made CALLS times. A
# training step is made once in a span.
ROUNDS, SPANS, CALLS = 60, 5, 10
CHANNELS = 64
RULER = "torch's BN, ReLU"
LAYERS, FUSED, STOCK = "ResNet-18, fused layers", "ResNet-18, bnres.fuse", "ResNet-18, stock"

# The greatest allowed ratios. A limit is 1.25 times the ratio on an idle Intel Xeon (torch 2.13).
# The factor allows for noise: in five runs, a ratio differed by at most 9% from its median over the
# runs. In two of these runs, other programs used both cores. If a call becomes faster, lower its
# limit.
LIMITS: dict[str, dict[str, float]] = {
    "BN+ReLU": {"inference": 2.05, "forward": 2.5, "backward": 1.7},
    "BN+add+ReLU": {"inference": 2.15, "forward": 2.8, "backward": 1.75},
    "BN+add+ReLU, two gradients": {"backward": 1.85},
    "BN+BN+add+ReLU": {"inference": 2.7, "forward": 3.1, "backward": 2.15},
    "BN+ReLU+max-pool": {"inference": 2.65, "forward": 3.1, "backward": 1.7},
    "conv+BN+ReLU": {"inference": 4.2, "forward": 4.05, "backward": 2.5},
    LAYERS: {"step": 52},
    FUSED: {"step": 49},
}


@dataclass(frozen=True)
class Timed:
    """A call to be timed.

    Attributes:
        row: name of the call's row in the table.
        kind: ``inference``, ``forward`` (in training), ``backward`` or ``step`` (forward, loss and
            backward).
        module: module that is called, in evaluation mode if ``kind`` is ``inference``, else in
            training mode.
        call: makes the call.
        calls: number of calls in a span.
    """

    row: str
    kind: str
    module: nn.Module
    call: Callable[[], object]
    calls: int = CALLS


def operation(
    row: str, module: nn.Module, call: Callable[[], Tensor], inputs: list[Tensor]
) -> Iterator[Timed]:
    """Yields the inference, the forward and the backward of ``module``, each as a call to be timed.

    ``call`` calls ``module`` on ``inputs``.
    """
    y = call()
    dy, wanted = torch.ones_like(y), [*inputs, *module.parameters()]

    def inference() -> None:
        with torch.no_grad():
            call()

    def backward() -> None:
        torch.autograd.grad(y, wanted, dy, retain_graph=True)

    yield Timed(row, "inference", module, inference)
    yield Timed(row, "forward", module, call)
    yield Timed(row, "backward", module, backward)


def training_step(row: str, model: nn.Module) -> Timed:
    """Returns a training step of a ResNet-18: forward, loss and backward."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    labels, parameters = torch.zeros(2, dtype=torch.long), list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        F.cross_entropy(model(x), labels).backward()

    return Timed(row, "step", model, step, calls=1)


def ruler() -> Iterator[Timed]:
    """Yields calls of torch's batch norm and ReLU, by whose times all other times are divided."""
    small = torch.randn(2, CHANNELS, 2, 2).requires_grad_()
    stock = nn.BatchNorm2d(CHANNELS)
    yield from operation(RULER, stock, lambda: torch.relu(stock(small)), [small])


def cases() -> Iterator[Timed]:
    """Yields all calls to be timed, including the calls of `ruler`."""
    yield from ruler()
    x, residual = (
        torch.randn(2, CHANNELS, 8, 8, dtype=torch.bfloat16)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    )
    bn, other = BatchNormAct2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
    pool = BatchNormActMaxPool2d(CHANNELS, 3, 2, 1)
    both = nn.ModuleList([bn, other])
    conv = ConvBatchNormAct2d(CHANNELS, CHANNELS, 3, padding=1, dtype=torch.bfloat16)
    yield from operation("BN+ReLU", bn, lambda: bn(x), [x])
    yield from operation("BN+add+ReLU", bn, lambda: bn(x, residual), [x])
    *_, backward = operation("", bn, lambda: bn(x, residual), [x, residual])
    yield replace(backward, row="BN+add+ReLU, two gradients")
    yield from operation(
        "BN+BN+add+ReLU", both, lambda: bn(x, residual, residual_norm=other), [x, residual]
    )
    yield from operation("BN+ReLU+max-pool", pool, lambda: pool(x), [x])
    yield from operation("conv+BN+ReLU", conv, lambda: conv(x), [x])
    yield training_step(LAYERS, resnet18(10))
    yield training_step(FUSED, fuse(resnet18(10, fused=False)))
    yield training_step(STOCK, resnet18(10, fused=False))


@contextmanager
def launches_do_nothing() -> Iterator[None]:
    """Inside the context, calls compile our kernels for a GPU but launch nothing."""
    triton.runtime.driver.set_active(StandInDriver(SM90))
    with (
        patch.object(CompiledKernel, "_init_handles", lambda self: None),
        patch.object(CompiledKernel, "run", property(lambda self: lambda *arguments: None)),
        use_backend("triton"),
    ):
        yield


def avoid_noise() -> None:
    """Limits torch to one thread and, if possible, to one core. Turns off garbage collection."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    gc.collect()
    gc.disable()


def span(timed: Timed) -> float:
    """Makes the calls of one span. Returns the microseconds per call."""
    start = time.thread_time_ns()
    for _ in range(timed.calls):
        timed.call()
    return (time.thread_time_ns() - start) / timed.calls / 1e3


@dataclass
class Times:
    """The measured times of a call.

    Attributes:
        spans: for each span, the microseconds per call.
        ratios: for each span, the time per call divided by the time of torch's batch norm and ReLU,
            which was measured just before.
    """

    spans: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def measure(timed: Sequence[Timed]) -> list[Times]:
    """Returns the times of each call. ``timed`` must include the calls of `ruler`."""
    rulers = {one.kind: [one] for one in timed if one.row == RULER}
    rulers["step"] = [*rulers["forward"], *rulers["backward"]]
    found = [Times() for _ in timed]
    for _ in range(ROUNDS):
        for one, times in zip(timed, found, strict=True):
            for each in (one, *rulers[one.kind]):
                each.module.train(one.kind != "inference")
                span(each)  # fills caches, and compiles in the first round
            for _ in range(SPANS):
                unit = sum(map(span, rulers[one.kind]))
                times.spans.append(span(one))
                times.ratios.append(times.spans[-1] / unit)
    return found


def run() -> list[str]:
    """Times all calls and prints a table. Returns a message for each ratio above its limit.

    This function replaces triton's driver, so the process can't run kernels afterwards.

    Raises:
        ValueError: if TRITON_INTERPRET is set.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("unset TRITON_INTERPRET: triton's interpreter does not compile kernels")
    with launches_do_nothing(), convolutions_compute_nothing():
        timed = list(cases())
        avoid_noise()
        found = measure(timed)
    rows = {
        (one.row, one.kind): (
            min(times.spans),
            statistics.median(times.spans),
            statistics.median(times.ratios),
        )
        for one, times in zip(timed, found, strict=True)
    }
    fused, stock = rows[FUSED, "step"], rows[STOCK, "step"]
    rows["ResNet-18, fuse - stock", "step"] = tuple(map(operator.sub, fused, stock))
    print(f"{'':37} {'µs':>8} {'(median)':>10} {'ratio':>7} {'limit':>7}")
    over = []
    for (row, kind), (least, median, ratio) in rows.items():
        limit = LIMITS.get(row, {}).get(kind)
        print(
            f"{row:26} {kind:10} {least:8.1f} {f'({median:.1f})':>10} {ratio:7.2f} "
            f"{'-' if limit is None else format(limit, '.2f'):>7}"
        )
        if limit is not None and ratio > limit:
            over.append(f"{row}, {kind}: the ratio {ratio:.2f} exceeds its limit {limit:.2f}")
    return over
