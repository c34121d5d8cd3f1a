"""Batch norm, activation and max-pool."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.activations import resolve
from bnres.autograd.apply import apply
from bnres.autograd.batch_norm_act_max_pool import (
    BatchNormActMaxPoolFunction,
)
from bnres.backend import uses_kernels
from bnres.functional.aten import batch_norm_act_aten
from bnres.functional.batch_norm import batch_norm_act
from bnres.functional.checks import check_input, check_norm
from bnres.functional.prepare import (
    batch_counter,
    dense_pair,
    packed_buffers,
    packed_parameters,
    wants_grad,
)
from bnres.kernels.window import Window

Size = int | tuple[int, int]


def batch_norm_act_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    act: str | type[torch.nn.Module] | None = "relu",
    act_kwargs: dict[str, Any] | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Fused ``max_pool2d(act(batch_norm(input)))``, the stem of a ResNet.

    What is pooled is never written. The values compared are those rounded to the dtype of
    ``input``; the first of equal ones wins and NaN propagates, as in
    `torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W), fp16, bf16, fp32 or fp64, contiguous or channels_last.
        running_mean, running_var, weight, bias: as in `batch_norm_act`.
        kernel_size, stride, padding, dilation, ceil_mode: as in
            `torch.nn.functional.max_pool2d`.
        act, act_kwargs, training, momentum, eps, num_batches_tracked: as in `batch_norm_act`.

    Returns:
        (N, C, OH, OW) in the dtype and memory format of ``input``.

    Raises:
        ValueError: for an input that is not 4-D, a padding of more than half the kernel, a window
            that does not fit, and as `batch_norm_act`.
    """
    name, param = resolve(act, act_kwargs)
    if input.dim() != 4:
        raise ValueError(f"expected 4D input (got {input.dim()}D input)")
    check_input(input, training)
    check_norm(input, running_mean, running_var, weight, bias, training)
    window = pooling_window(kernel_size, stride, padding, dilation)
    size = window.output_size(input.shape[2], input.shape[3], ceil_mode)
    if min(size) < 1:
        raise ValueError(f"input of {tuple(input.shape)} is too small: its pooled size is {size}")
    # With dilation a window can lie in the padding alone; torch's pooling has an answer to that.
    dilated = any(
        pad and gap > 1
        for pad, gap in (
            (window.padding_h, window.dilation_h),
            (window.padding_w, window.dilation_w),
        )
    )
    if dilated and uses_kernels(input):
        y = batch_norm_act(
            input, running_mean, running_var, weight, bias, act=act, act_kwargs=act_kwargs,
            training=training, momentum=momentum, eps=eps,
            num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
        return F.max_pool2d(y, kernel_size, stride, padding, dilation, ceil_mode)
    counter = batch_counter(num_batches_tracked, training, input)
    if not uses_kernels(input):
        y = batch_norm_act_aten(
            input, running_mean, running_var, weight, bias, None, name, param, training, momentum,
            eps,
        )  # fmt: skip
        return F.max_pool2d(y, kernel_size, stride, padding, dilation, ceil_mode)
    input, _ = dense_pair(input, None)
    needs_grad = wants_grad(input, weight, bias)
    factor = momentum if isinstance(momentum, Tensor) else None
    with packed_buffers(training, running_mean, running_var) as buffers:
        return apply(
            BatchNormActMaxPoolFunction, input, *packed_parameters(weight, bias), *buffers, counter,
            factor, 0.0 if factor is not None else momentum, training, eps, name, param,
            window.as_list(), ceil_mode, needs_grad,
        )[0]  # fmt: skip


def pooling_window(kernel_size: Size, stride: Size | None, padding: Size, dilation: Size) -> Window:
    """The window of a pooling with torch's arguments.

    Raises:
        ValueError: for a size below 1, or a padding of more than half the kernel.
    """
    kernel = _pair("kernel_size", kernel_size, 1)
    steps = _pair("stride", kernel_size if stride is None else stride, 1)
    pads, gaps = _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    if any(pad > size // 2 for pad, size in zip(pads, kernel, strict=True)):
        raise ValueError(f"padding must be at most half of kernel_size, got {padding!r}")
    return Window(*kernel, *steps, *pads, *gaps)


def _pair(name: str, value: Size, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name} must be one or two numbers from {least} on, got {value!r}")
    return pair[0], pair[1]
