"""Measures two ways to compute each convolution of a model and the batch norm after it.

In the first way, our kernel computes both. In the second way, torch's convolution runs, followed by
our batch norm in a separate kernel.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnres.functional import conv2d_batch_norm_act
from bnres.kernels.conv_config import MIN_CHANNELS, ConvConfig, ConvShape, search_space
from bnres.kernels.norm import Norm, RunningStatistics
from bnres.routes import ConvCall, Measured, save_table, use_conv_route

# A timer calls a function without arguments, and returns the time of the call in milliseconds. The
# L2 cache is cold when the call begins.
Timer = Callable[[Callable[[], object]], float]
# The greatest allowed difference between the outputs of our kernel and of torch. It is relative to
# the largest absolute value of torch's output, or absolute if that value is below 1. For fp16 and
# bf16 it is about four times the dtype's eps. For fp32 it is about five times TF32's eps, because
# our kernel rounds to TF32.
AGREEMENT = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 5e-3}
EPS = 1e-5
# The number of FLOPs that a GPU computes in the time that it needs to move one byte. For an H200,
# this is 790 TFLOP/s (in bf16) divided by 4.3 TB/s.
FLOPS_PER_BYTE = 184


def device_timer() -> Timer:
    """Returns a timer that measures the median time with ``triton.testing.do_bench``.

    do_bench flushes the L2 cache before each call.
    """
    from triton.testing import do_bench

    return lambda call: float(do_bench(call, return_mode="median"))


def conv_calls(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[ConvCall]:
    """Returns the different convolutions of a model that our kernel supports.

    Each convolution is returned twice: without and with a residual.

    Args:
        model: a module built from torch's layers. A copy of the module is called in eval mode on
            the meta device.
        shape: shape of the module's input, (N, C, H, W).
        dtype: dtype of the convolutions.
    """
    found: dict[ConvCall, None] = {}

    def note(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, nn.Conv2d)
        n, channels, height, width = inputs[0].shape
        if conv.groups != 1 or isinstance(conv.padding, str) or channels < MIN_CHANNELS:
            return
        window = ConvShape(*conv.kernel_size, *conv.stride, *conv.padding, *conv.dilation)  # type: ignore[call-arg, misc]
        name = str(dtype).removeprefix("torch.")
        plain = ConvCall(name, n, channels, height, width, conv.out_channels, window, False)
        found[plain] = found[replace(plain, has_residual=True)] = None

    twin = copy.deepcopy(model).to("meta").eval()
    for module in twin.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        twin(torch.empty(shape, device="meta"))
    return list(found)


def tune(
    calls: list[ConvCall],
    path: Path,
    about: dict[str, str],
    device: torch.device,
    timer: Timer,
    *,
    minutes: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], object] = print,
) -> None:
    """Measures ``calls`` and saves each call as a row of a table.

    The calls with the longest estimated time are measured first.

    Args:
        calls: the convolutions, see `conv_calls`.
        path: the file of the table. Its rows for other calls are kept.
        about: facts about the measurement, such as the GPU, torch's version and the date. They are
            saved in the table.
        device: the GPU.
        timer: measures the time of a call in milliseconds.
        minutes: the time limit, after which no other configuration is measured. The row of the
            last call then has the fastest configuration so far, and the names of the configurations
            that were left out. Calls that were not started get no row.
        clock: returns the time in seconds.
        say: prints a line for each call, and for each configuration that fails or is left out.
    """
    deadline = clock() + 60 * minutes
    calls = sorted(calls, key=_work, reverse=True)
    for index, call in enumerate(calls):
        if clock() >= deadline:
            for left in calls[index:]:
                say(f"left out: {left.key}")
            return
        found = _measure(call, device, timer, lambda: clock() < deadline)
        save_table(path, [found], about)
        kernel = "failed" if found.kernel_ms is None else f"{found.kernel_ms:.3f} ms"
        say(f"{index + 1}/{len(calls)} {call.key}: kernel {kernel}, torch {found.torch_ms:.3f} ms")
        for name, reason in found.failed.items():
            say(f"  failed: {name}: {reason}")
        for name in found.left_out:
            say(f"  left out: {name}")


def _work(call: ConvCall) -> float:
    """Returns an estimate of a call's time: the number of FLOPs that a GPU computes in this time.

    The estimate is the greater of the call's FLOPs and the call's bytes times FLOPS_PER_BYTE.
    """
    height, width = call.shape.output_size(call.height, call.width)
    positions = call.batch * height * width
    depth = call.channels * call.shape.taps
    elements = (
        call.batch * call.channels * call.height * call.width
        + positions * call.out_channels * (1 + call.has_residual)
        + call.out_channels * depth
    )
    itemsize = getattr(torch, call.dtype).itemsize
    return max(2 * positions * call.out_channels * depth, FLOPS_PER_BYTE * elements * itemsize)


def _measure(
    call: ConvCall, device: torch.device, timer: Timer, has_time: Callable[[], bool]
) -> Measured:
    """Measures torch's convolution and each configuration of our kernel on random data.

    A configuration is measured only if its output agrees with torch's.
    """
    from triton.errors import TritonError

    operands = _operands(call, device)
    times: dict[ConvConfig, float] = {}
    failed: dict[str, str] = {}
    left_out: list[str] = []
    with torch.no_grad(), use_conv_route("torch"):
        expected = _by_torch(operands, call)
        torch_ms = timer(partial(_by_torch, operands, call))
        rows, itemsize = expected.numel() // call.out_channels, expected.element_size()
        for config in search_space(rows, call.channels, call.out_channels, itemsize):
            if not has_time():
                left_out.append(config.name)
                continue
            by_kernel = partial(_by_kernel, operands, call, config)
            try:
                _check(by_kernel(), expected)
                times[config] = timer(by_kernel)
            except (TritonError, RuntimeError) as error:
                # The GPU has too few resources, the compiler fails, or the outputs differ.
                first_line = next(iter(str(error).strip().splitlines()), "")
                failed[config.name] = f"{type(error).__name__}: {first_line}"
    best = min(times, key=times.__getitem__, default=None)
    kernel_ms = None if best is None else times[best]
    return Measured(call, best, kernel_ms, torch_ms, failed, left_out)


def _operands(call: ConvCall, device: torch.device) -> tuple[Any, ...]:
    dtype, last = getattr(torch, call.dtype), torch.channels_last
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    x = random(call.batch, call.channels, call.height, call.width)
    size = (call.out_channels, call.channels, call.shape.kernel_h, call.shape.kernel_w)
    filter = random(*size) / (call.channels * call.shape.taps) ** 0.5
    channel = random(call.out_channels)
    statistics = RunningStatistics(channel * 0.1, channel.abs() + 0.5, EPS)
    norm = Norm(statistics, channel.abs() + 0.5, channel * 0.1)
    residual = None
    if call.has_residual:
        output = call.shape.output_size(call.height, call.width)
        residual = random(call.batch, call.out_channels, *output)
        residual = residual.to(dtype).contiguous(memory_format=last)
    return (
        x.to(dtype).contiguous(memory_format=last),
        filter.to(dtype).contiguous(memory_format=last),
        norm,
        residual,
    )


def _by_torch(operands: tuple[Any, ...], call: ConvCall) -> Tensor:
    x, filter, norm, residual = operands
    mean, var, eps = norm.statistics
    return conv2d_batch_norm_act(
        x, filter, None, mean, var, norm.weight, norm.bias, eps=eps, residual=residual,
        **call.shape.options,
    )  # fmt: skip


def _by_kernel(operands: tuple[Any, ...], call: ConvCall, config: ConvConfig) -> Tensor:
    from bnres.kernels.conv import conv_bn_act

    x, filter, norm, residual = operands
    return conv_bn_act(x, filter, None, norm, residual, "relu", 0.0, call.shape, config=config)


def _check(actual: Tensor, expected: Tensor) -> None:
    """Raises a RuntimeError unless ``actual``, our kernel's output, agrees with ``expected``."""
    scale = max(1.0, expected.abs().max().item())
    error = (actual.float() - expected.float()).abs().max().item() / scale
    if not error <= AGREEMENT[actual.dtype]:
        raise RuntimeError(f"the output differs by {error:.2g} from torch's convolution")
