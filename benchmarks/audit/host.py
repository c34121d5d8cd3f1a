"""Times the CPU's part of a call, without a GPU, and compares it with torch's batch norm and ReLU.

The CPU time of the calling thread is measured. It includes Python, torch's dispatcher and autograd,
the allocation of outputs, and the part of each launch before triton calls the GPU's driver. Not
included are the driver's part of a launch, and the optimiser. Our kernels are compiled for a GPU,
but launching them does nothing. torch's own operations run on the CPU, on tensors so small that
their arithmetic takes little time. Convolutions return uninitialised tensors, with our layers and
with torch's.

Each call is timed in many short spans, and the time of its shortest span is used. In a span the
call is made a few times. Spans of all calls alternate: if another program runs for a second, it
slows a few spans of every call instead of all spans of one call. Times are divided by the time of
torch's batch norm and ReLU in the same run, because this ratio depends little on the machine.
`LIMITS` contains the greatest ratios that are allowed.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from bnres.nn import BatchNormAct2d, BatchNormActMaxPool2d

# Each call is timed in ROUNDS rounds. A round has SPANS spans, and in a span the call is made CALLS
# times, or once if it is a training step. The clock is read before and after each span.
ROUNDS, SPANS, CALLS = 60, 5, 10
CHANNELS = 64
RULER = "torch's BN, ReLU"
LAYERS, FUSED, STOCK = "ResNet-18, fused layers", "ResNet-18, bnres.fuse", "ResNet-18, stock"

# The greatest allowed ratios of a call's time to the time of torch's batch norm and ReLU. A limit
# is 1.25 times the ratio that was found in several runs, or 1.4 times for a training step. In 16
# runs with both cores loaded, the greatest ratio was 1.07 times the median ratio, or 1.3 times for
# a training step. The ratio of a training step varies more because a step is longer than the time
# between two thread switches. If a call becomes faster, lower its limit.
LIMITS: dict[str, dict[str, float]] = {
    "BN+ReLU": {"inference": 1.6, "forward": 1.95, "backward": 1.4},
    "BN+add+ReLU": {"inference": 1.7, "forward": 2.2, "backward": 1.45},
    "BN+add+ReLU, two gradients": {"backward": 1.5},
    "BN+BN+add+ReLU": {"inference": 2.1, "forward": 2.4, "backward": 1.75},
    "BN+ReLU+max-pool": {"inference": 2.2, "forward": 2.5, "backward": 1.4},
    LAYERS: {"step": 66},
    FUSED: {"step": 66},
}


@dataclass(frozen=True)
class Timed:
    """A call to be timed.

    Attributes:
        row: name of the call's row in the table.
        kind: ``inference``, ``forward``, ``backward`` or ``step``. ``forward`` is in training, and
            ``step`` is forward and backward.
        module: module that is called, in evaluation if ``kind`` is ``inference``, else in training.
        call: the call.
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
    """Yields the inference, the forward and the backward of a call to be timed.

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
    """Returns forward, loss and backward of a ResNet-18."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    labels, parameters = torch.zeros(2, dtype=torch.long), list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        F.cross_entropy(model(x), labels).backward()

    return Timed(row, "step", model, step, calls=1)


def ruler() -> Iterator[Timed]:
    """Yields calls of torch's batch norm and ReLU. All times are divided by the times of these."""
    small = torch.randn(2, CHANNELS, 2, 2).requires_grad_()
    stock = nn.BatchNorm2d(CHANNELS)
    yield from operation(RULER, stock, lambda: torch.relu(stock(small)), [small])


def cases() -> Iterator[Timed]:
    """Yields all calls to be timed, starting with the calls of `ruler`."""
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
    yield from operation("BN+ReLU", bn, lambda: bn(x), [x])
    yield from operation("BN+add+ReLU", bn, lambda: bn(x, residual), [x])
    *_, backward = operation("", bn, lambda: bn(x, residual), [x, residual])
    yield replace(backward, row="BN+add+ReLU, two gradients")
    yield from operation(
        "BN+BN+add+ReLU", both, lambda: bn(x, residual, residual_norm=other), [x, residual]
    )
    yield from operation("BN+ReLU+max-pool", pool, lambda: pool(x), [x])
    yield training_step(LAYERS, resnet18(10))
    yield training_step(FUSED, fuse(resnet18(10, fused=False)))
    yield training_step(STOCK, resnet18(10, fused=False))


@contextmanager
def launches_do_nothing() -> Iterator[None]:
    """Compiles our kernels for a GPU inside the context, but launches nothing."""
    triton.runtime.driver.set_active(StandInDriver(SM90))
    with (
        patch.object(CompiledKernel, "_init_handles", lambda self: None),
        patch.object(CompiledKernel, "run", property(lambda self: lambda *arguments: None)),
        use_backend("triton"),
    ):
        yield


def avoid_noise() -> None:
    """Limits the process to one thread and, if possible, one core. Stops garbage collection."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    gc.collect()
    gc.disable()


def microseconds(timed: Sequence[Timed]) -> list[list[float]]:
    """Returns, for each of ``timed``, the microseconds per call in each of its spans."""
    found: list[list[float]] = [[] for _ in timed]
    for _ in range(ROUNDS):
        for one, times in zip(timed, found, strict=True):
            one.module.train(one.kind != "inference")
            for _ in range(one.calls):
                one.call()  # This fills the caches. In the first round it also compiles.
            for _ in range(SPANS):
                start = time.thread_time_ns()
                for _ in range(one.calls):
                    one.call()
                times.append((time.thread_time_ns() - start) / one.calls / 1e3)
    return found


def run() -> list[str]:
    """Prints a table of all calls. Returns a message for each ratio that exceeds its limit.

    This function replaces triton's driver, so the process can't run kernels afterwards.

    Raises:
        ValueError: if TRITON_INTERPRET is set.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("unset TRITON_INTERPRET: triton's interpreter does not compile kernels")
    with launches_do_nothing(), convolutions_compute_nothing():
        timed = list(cases())
        avoid_noise()
        found = microseconds(timed)
    rows = {
        (one.row, one.kind): (min(times), statistics.median(times))
        for one, times in zip(timed, found, strict=True)
    }
    fused, stock = rows[FUSED, "step"], rows[STOCK, "step"]
    rows["ResNet-18, fuse - stock", "step"] = fused[0] - stock[0], fused[1] - stock[1]
    unit = {kind: least for (row, kind), (least, _) in rows.items() if row == RULER}
    unit["step"] = unit["forward"] + unit["backward"]
    print(f"{'':37} {'µs':>8} {'(median)':>10} {'ratio':>7} {'limit':>7}")
    over = []
    for (row, kind), (least, median) in rows.items():
        ratio, limit = least / unit[kind], LIMITS.get(row, {}).get(kind)
        print(
            f"{row:26} {kind:10} {least:8.1f} {f'({median:.1f})':>10} {ratio:7.2f} "
            f"{'-' if limit is None else format(limit, '.2f'):>7}"
        )
        if limit is not None and ratio > limit:
            over.append(f"{row}, {kind}: the ratio {ratio:.2f} exceeds its limit {limit:.2f}")
    return over
