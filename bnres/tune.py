"""Measures, for a model's convolutions, our kernel against torch's convolution and our apply."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnres.functional import conv2d_batch_norm_act
from bnres.kernels.conv_config import ConvConfig, ConvShape, search_space
from bnres.kernels.norm import Norm
from bnres.routes import ConvCall, use_conv_route

# Milliseconds of a call, its memory cold.
Timer = Callable[[Callable[[], object]], float]
# How far our kernel's output may be from torch's, over its largest value: two rounding steps.
AGREEMENT = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 5e-3}


def device_timer() -> Timer:
    """Medians of triton's benchmark, which flushes the L2 cache between calls."""
    from triton.testing import do_bench

    return lambda call: float(do_bench(call, return_mode="median"))


def conv_calls(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[ConvCall]:
    """The different convolutions that a forward of ``model`` calls and our kernel takes.

    Each comes with a residual and without.

    Args:
        model: any module; it runs in eval mode on tensors without memory, as a copy.
        shape: of its input, (N, C, H, W).
        dtype: of the convolutions.
    """
    from bnres.fusion import unfuse

    found: dict[ConvCall, None] = {}

    def note(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, nn.Conv2d)
        n, channels, height, width = inputs[0].shape
        if conv.groups != 1 or isinstance(conv.padding, str):
            return
        window = ConvShape(*conv.kernel_size, *conv.stride, *conv.padding, *conv.dilation)  # type: ignore[call-arg, misc]
        if not window.has_kernel(channels):
            return
        name = str(dtype).removeprefix("torch.")
        plain = ConvCall(name, n, channels, height, width, conv.out_channels, window, False)
        found[plain] = found[replace(plain, has_residual=True)] = None

    stock = unfuse(model).to("meta").eval()
    for module in stock.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        stock(torch.empty(shape, device="meta"))
    return list(found)


@dataclass(frozen=True)
class Measured:
    """The times of one call, and the fastest configuration of our kernel."""

    call: ConvCall
    config: ConvConfig
    kernel_ms: float
    torch_ms: float

    def as_row(self) -> dict[str, Any]:
        """A row for `bnres.routes.save_table`."""
        return dict(vars(self))


def measure(calls: list[ConvCall], device: torch.device, timer: Timer) -> Iterator[Measured]:
    """Times each call both ways, on random data, each configuration only after it agreed.

    Raises:
        RuntimeError: if our kernel's output is not torch's.
    """
    from triton.runtime.errors import OutOfResources

    for call in calls:
        operands = _operands(call, device)
        by_torch = partial(_by_torch, operands, call)
        by_kernel = partial(_by_kernel, operands, call)
        times: dict[ConvConfig, float] = {}
        with torch.no_grad(), use_conv_route("torch"):
            expected = by_torch()
            torch_ms = timer(by_torch)
            rows = expected.numel() // call.out_channels
            itemsize = expected.element_size()
            depth = call.shape.depth(call.channels, itemsize)
            for config in search_space(rows, depth, call.out_channels, itemsize):
                try:
                    actual = by_kernel(config=config)
                except OutOfResources:
                    continue  # a tile that this GPU has no room for
                _check(actual, expected, call)
                times[config] = timer(partial(by_kernel, config=config))
        if times:
            best = min(times, key=times.__getitem__)
            yield Measured(call, best, times[best], torch_ms)


def _operands(call: ConvCall, device: torch.device) -> tuple[Any, ...]:
    dtype, last = getattr(torch, call.dtype), torch.channels_last
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    x = random(call.batch, call.channels, call.height, call.width)
    size = (call.out_channels, call.channels, call.shape.kernel_h, call.shape.kernel_w)
    filter = random(*size) / (call.channels * call.shape.taps) ** 0.5
    channel = random(call.out_channels)
    norm = Norm(channel * 0.1, channel.abs() + 0.5, channel.abs() + 0.5, channel * 0.1)
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
    s = call.shape
    y: Tensor = conv2d_batch_norm_act(
        x, filter, None, norm.mean, norm.rstd, norm.weight, norm.bias,
        stride=(s.stride_h, s.stride_w), padding=(s.padding_h, s.padding_w),
        dilation=(s.dilation_h, s.dilation_w), residual=residual,
    )  # fmt: skip
    return y


def _by_kernel(operands: tuple[Any, ...], call: ConvCall, config: ConvConfig) -> Tensor:
    from bnres.kernels.conv import conv_bn_act

    x, filter, norm, residual = operands
    return conv_bn_act(
        x, filter, None, norm, 1e-5, residual, "relu", 0.0, call.shape, config=config
    )


def _check(actual: Tensor, expected: Tensor, call: ConvCall) -> None:
    scale = max(1.0, expected.abs().max().item())
    error = (actual.float() - expected.float()).abs().max().item() / scale
    if not error <= AGREEMENT[actual.dtype]:
        raise RuntimeError(f"{call.key}: the kernel is {error:.2g} from torch's convolution")
