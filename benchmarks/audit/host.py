"""Times the host from a module's call to its last launch, without a GPU.

Kernels are compiled for one that is not there, and their launches do nothing; what a driver takes
for each comes on top.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
import triton
from torch import Tensor, nn
from triton.compiler import CompiledKernel

from benchmarks.audit.standin import SM90, StandInDriver
from bnres import use_backend
from bnres.nn import BatchNormAct2d, BatchNormActMaxPool2d

SHAPE = (2, 64, 8, 8)
ROUNDS, CALLS = 25, 40


def microseconds(call: Callable[[], object]) -> float:
    """The median time of a call, over rounds of several."""
    for _ in range(CALLS):
        call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def cases() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], nn.Module]]:
    """Calls of modules on an input and a residual, by name."""
    bn, other = BatchNormAct2d(SHAPE[1]), nn.BatchNorm2d(SHAPE[1])
    pool = BatchNormActMaxPool2d(SHAPE[1], 3, 2, 1)
    return {
        "BN+ReLU": (lambda x, r: bn(x), bn),
        "BN+add+ReLU": (lambda x, r: bn(x, r), bn),
        "BN+BN+add+ReLU": (lambda x, r: bn(x, r, residual_norm=other), nn.ModuleList([bn, other])),
        "BN+ReLU+max-pool": (lambda x, r: pool(x), pool),
    }


def run() -> None:
    """Prints a table: inference, forward in training and backward of each operation."""
    if triton.knobs.runtime.interpret:
        raise ValueError("unset TRITON_INTERPRET: the interpreter compiles nothing to launch")
    torch.set_num_threads(1)
    last = torch.channels_last
    x, residual = (
        torch.randn(SHAPE).to(torch.bfloat16).contiguous(memory_format=last).requires_grad_()
        for _ in range(2)
    )
    triton.runtime.driver.set_active(StandInDriver(SM90))
    print(f"{'':18} {'inference':>9} {'forward':>9} {'backward':>9}  microseconds")
    with ExitStack() as stack:
        stack.enter_context(patch.object(CompiledKernel, "_init_handles", lambda self: None))
        launcher = property(lambda self: lambda *arguments: None)
        stack.enter_context(patch.object(CompiledKernel, "run", launcher))
        stack.enter_context(use_backend("triton"))
        for name, (call, module) in cases().items():
            y = call(x, residual)
            dy, wanted = torch.ones_like(y), [x, *module.parameters()]

            def backward(y=y, dy=dy, wanted=wanted) -> None:  # type: ignore[no-untyped-def]
                torch.autograd.grad(y, wanted, dy, retain_graph=True)

            def inference(call=call) -> None:  # type: ignore[no-untyped-def]
                with torch.no_grad():
                    call(x, residual)

            module.eval()
            without_grad = microseconds(inference)
            module.train()
            forward = microseconds(lambda call=call: call(x, residual))  # type: ignore[misc]
            print(f"{name:18} {without_grad:9.0f} {forward:9.0f} {microseconds(backward):9.0f}")
