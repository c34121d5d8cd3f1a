"""Decides whether our kernel computes a convolution, and with which configuration."""

from typing import NamedTuple

import torch
from torch import Tensor

from bnres.backend import uses_kernels
from bnres.kernels.conv_config import MIN_CHANNELS, ConvConfig, ConvShape, conv_config
from bnres.operations.call import needs_aten
from bnres.routes import ConvCall, kernel_config

Size = int | tuple[int, ...]
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class KernelConv(NamedTuple):
    """How our kernel computes a convolution.

    The input and the filters are cast to ``dtype``.
    """

    dtype: torch.dtype
    shape: ConvShape
    config: ConvConfig


def kernel_conv(
    input: Tensor,
    conv_weight: Tensor,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    has_residual: bool,
) -> KernelConv | None:
    """Returns how our kernel computes a convolution, or None if torch's convolution must run.

    Our kernel runs if it supports the input and the filters, and if `kernel_config` chooses it. For
    invalid arguments the result is None, so that torch's convolution raises the error.
    """
    if (
        not uses_kernels(input)
        or needs_aten(input, conv_weight)
        or groups != 1
        or input.shape[1] != conv_weight.shape[1]
        or not conv_weight.shape[0]
        or input.device != conv_weight.device
    ):
        return None
    shape = _conv_shape(conv_weight, stride, padding, dilation)
    dtype = _common_dtype(input, conv_weight)
    if shape is None or dtype not in KERNEL_DTYPES:
        return None
    if dtype == torch.float32 and not _allows_tf32():
        return None
    batch, channels, height, width = input.shape
    output = shape.output_size(height, width)
    if channels < MIN_CHANNELS or min(output) < 1:
        return None
    call = ConvCall(
        str(dtype).removeprefix("torch."), batch, channels, height, width, conv_weight.shape[0],
        shape, has_residual,
    )  # fmt: skip
    takes_kernel, config = kernel_config(call, input.device)
    if not takes_kernel:
        return None
    if config is None:
        rows = batch * output[0] * output[1]
        config = conv_config(rows, channels, conv_weight.shape[0], dtype.itemsize)
    return KernelConv(dtype, shape, config)


def _allows_tf32() -> bool:
    """Whether torch's own convolution may round fp32 to TF32, as our kernel does.

    While torch.compile captures a graph, the result is False, because torch.compile can't read
    ``fp32_precision``.
    """
    if torch.compiler.is_compiling():
        return False
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


def _common_dtype(input: Tensor, conv_weight: Tensor) -> torch.dtype | None:
    """Returns the dtype in which the input and the filters are multiplied, or None.

    If autocast is enabled and neither tensor is fp64, this is autocast's dtype. Otherwise it is the
    dtype of both tensors, or None if their dtypes differ.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (input.dtype, conv_weight.dtype):
        return torch.get_autocast_dtype(device)
    return input.dtype if input.dtype == conv_weight.dtype else None


def _conv_shape(
    conv_weight: Tensor, stride: Size, padding: Size | str, dilation: Size
) -> ConvShape | None:
    """Returns the convolution's window, or None if our kernel does not support this window."""
    if isinstance(padding, str):
        return None
    pairs = [_pair(value) for value in (stride, padding, dilation)]
    if any(
        len(pair) != 2 or min(pair) < least for pair, least in zip(pairs, (1, 0, 1), strict=True)
    ):
        return None
    return ConvShape(*conv_weight.shape[2:], *pairs[0], *pairs[1], *pairs[2])


def _pair(value: Size) -> tuple[int, ...]:
    """Returns ``value`` as a tuple. A single number counts for both axes."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values
