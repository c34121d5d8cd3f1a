"""max_pool2d(act(batch_norm(x))), the stem of a ResNet."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.activations import resolve
from bnres.backend import uses_kernels
from bnres.operations.arguments import wants_grad
from bnres.operations.batch_norm_act import BATCH_NORM_ACT, Buffers, Inputs, Spec, batch_norm_act
from bnres.operations.call import call
from bnres.operations.norms import split_momentum

Size = int | tuple[int, int]

# If the stem's output was made again, that of the first block, whose residual it is, would be kept.
BATCH_NORM_ACT_MAX_POOL = replace(BATCH_NORM_ACT, again=None)


def batch_norm_act_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
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
    fork: bool = False,
) -> Any:
    """Fused ``max_pool2d(act(batch_norm(input + input_bias)))``, the stem of a ResNet.

    The pooled activation is never written to memory. The values compared are those rounded to the dtype of
    ``input``; the first of equal ones wins and NaN propagates, as in
    `torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W), fp16, bf16, fp32 or fp64, contiguous or channels_last.
        running_mean, running_var, weight, bias, input_bias: as in `batch_norm_act`.
        kernel_size, stride, padding, dilation, ceil_mode: as in
            `torch.nn.functional.max_pool2d`.
        act, act_kwargs, training, momentum, eps, num_batches_tracked, fork: as in
            `batch_norm_act`.

    Returns:
        (N, C, OH, OW) in the dtype and memory format of ``input``; with ``fork`` two of them.

    Raises:
        ValueError: for an input that is not 4-D, a padding of more than half the kernel, a window
            that does not fit, and as `batch_norm_act`.
    """
    name, param = resolve(act, act_kwargs)
    window = window_fields(kernel_size, stride, padding, dilation)
    device_momentum, number = split_momentum(momentum)
    inputs = Inputs(input, weight, bias, input_bias)
    counter = num_batches_tracked if training else None
    buffers = Buffers(running_mean, running_var, counter, device_momentum)
    spec = Spec(
        name, param, training, wants_grad(*inputs), True, number, eps, False, 0.0, 0.0, window,
        ceil_mode,
    )  # fmt: skip
    *_, padding_h, padding_w, dilation_h, dilation_w = window
    can_miss = (padding_h and dilation_h > 1) or (padding_w and dilation_w > 1)
    if can_miss and uses_kernels(input):
        BATCH_NORM_ACT_MAX_POOL.check(inputs, buffers, spec)
        # A window may be all padding, for which only torch's pooling defines a result.
        y = batch_norm_act(
            input, running_mean, running_var, weight, bias, input_bias=input_bias, act=act,
            act_kwargs=act_kwargs, training=training, momentum=momentum, eps=eps,
            num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
        y = F.max_pool2d(y, kernel_size, stride, padding, dilation, ceil_mode)
        return (y, y) if fork else y
    return call(BATCH_NORM_ACT_MAX_POOL, inputs, buffers, spec, fork)


def window_fields(
    kernel_size: Size, stride: Size | None, padding: Size, dilation: Size
) -> tuple[int, ...]:
    """The fields of `Window` for a pooling with torch's arguments.

    Raises:
        ValueError: for a size below 1, or a padding of more than half the kernel.
    """
    kernel = _pair("kernel_size", kernel_size, 1)
    pads = _pair("padding", padding, 0)
    if 2 * pads[0] > kernel[0] or 2 * pads[1] > kernel[1]:
        raise ValueError(f"padding must be at most half of kernel_size, got {padding!r}")
    steps = kernel if stride is None else _pair("stride", stride, 1)
    return *kernel, *steps, *pads, *_pair("dilation", dilation, 1)


def _pair(name: str, value: Size, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name} must be one or two numbers from {least} on, got {value!r}")
    return pair[0], pair[1]
