"""Convolution, batch norm, residual and activation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.activations import resolve
from bnres.autograd.apply import apply
from bnres.autograd.cancelled_bias import CancelledBiasFunction
from bnres.functional.batch_norm import batch_norm_act
from bnres.functional.checks import (
    check_channels,
    check_conv_bias,
    check_residual,
    check_statistics,
)
from bnres.functional.conv_route import Size, kernel_conv
from bnres.functional.prepare import packed_parameters, wants_grad
from bnres.ops import conv2d_batch_norm_act as ops


def conv2d_batch_norm_act(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str | type[torch.nn.Module] | None = "relu",
    act_kwargs: dict[str, Any] | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    twice: bool = False,
) -> Any:
    """Fused ``act(batch_norm(conv2d(input)) + residual)``.

    In training, or where gradients are asked for, it is torch's convolution and our batch norm.
    Without gradients, in evaluation, one kernel does all of it where that was measured to be
    faster on this GPU (see `bnres.routes`); in fp32 only if ``torch.backends.cudnn.allow_tf32`` is
    set, as it is by default. A ``conv_bias`` before the statistics of the batch cancels: it
    only moves the running mean, and its gradient is zeros.

    Args:
        input: (N, C, H, W); in autocast it is cast as `torch.nn.functional.conv2d` casts it.
        conv_weight, conv_bias: (K, C / groups, R, S) and (K,) or None.
        running_mean, running_var, weight, bias: (K,) or None, as in `batch_norm_act`.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        residual: of the output's shape (N, K, OH, OW), added before the activation.
        act, act_kwargs, training, momentum, eps, num_batches_tracked, twice: as in
            `batch_norm_act`.

    Returns:
        (N, K, OH, OW); with ``twice`` two of them.

    Raises:
        As `torch.nn.functional.conv2d` and `batch_norm_act`.
    """
    stats = (running_mean, running_var, weight, bias)
    check_conv_bias(conv_weight, conv_bias)
    if not training:
        check_statistics(running_mean, running_var)
        options = (stride, padding, dilation, groups)
        y = _by_kernel(
            input, conv_weight, conv_bias, stats, residual, act, act_kwargs, eps, options
        )
        if y is not None:
            return (y, y) if twice else y
    x = F.conv2d(input, conv_weight, None, stride, padding, dilation, groups)
    return after_convolution(
        x, conv_bias, *stats, residual=residual, act=act, act_kwargs=act_kwargs,
        training=training, momentum=momentum, eps=eps, num_batches_tracked=num_batches_tracked,
        twice=twice,
    )  # fmt: skip


def after_convolution(
    x: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    momentum: float | Tensor,
    **options: Any,
) -> Any:
    """`batch_norm_act` of ``x`` + ``conv_bias``, with no pass over ``x`` for the bias."""
    if conv_bias is None:
        return batch_norm_act(
            x, running_mean, running_var, weight, bias, training=training, momentum=momentum,
            **options,
        )  # fmt: skip
    if training:
        x = absorb_bias(x, conv_bias)
    elif wants_grad(conv_bias) or running_mean is None:
        x = x + conv_bias.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))
    else:
        running_mean = running_mean - conv_bias
    y = batch_norm_act(
        x, running_mean, running_var, weight, bias, training=training, momentum=momentum, **options
    )
    if training and x.numel():
        shift_running_mean(running_mean, conv_bias, momentum)
    return y


def absorb_bias(x: Tensor, conv_bias: Tensor) -> Tensor:
    """``x``, through which ``conv_bias`` gets its gradient of zeros."""
    if wants_grad(conv_bias):
        return apply(CancelledBiasFunction, x, conv_bias)
    return x


def shift_running_mean(
    running_mean: Tensor | None, conv_bias: Tensor, momentum: float | Tensor
) -> None:
    """What the bias, left out of the convolution, adds to the running mean."""
    if running_mean is None:
        return
    shift = (conv_bias.detach() * momentum).to(running_mean.dtype)
    if torch.compiler.is_compiling():
        running_mean.add_(shift)
    else:
        # ATen's batch norm has saved the buffer, which its backward does not read in training.
        running_mean.data.add_(shift)


def _by_kernel(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    stats: tuple[Tensor | None, ...],
    residual: Tensor | None,
    act: str | type[torch.nn.Module] | None,
    act_kwargs: dict[str, Any] | None,
    eps: float,
    options: tuple[Size, Size | str, Size, int],
) -> Tensor | None:
    """The output by our kernel, or None where torch's convolution is to do it."""
    if wants_grad(input, conv_weight, conv_bias, *stats[2:], residual):
        return None
    kernel = kernel_conv(input, conv_weight, *options, has_residual=residual is not None)
    if kernel is None:
        return None
    input, conv_weight = input.to(kernel.dtype), conv_weight.to(kernel.dtype)
    name, param = resolve(act, act_kwargs)
    check_channels(conv_weight.shape[0], *stats, device=input.device)
    last = torch.channels_last
    if residual is not None:
        if residual.dtype != input.dtype:
            return None
        size = kernel.shape.output_size(*input.shape[2:])
        check_residual(residual, (input.shape[0], conv_weight.shape[0], *size), input.device)
        residual = residual.contiguous(memory_format=last)
    conv_bias, running_mean, running_var, weight, bias = packed_parameters(conv_bias, *stats)
    assert running_mean is not None and running_var is not None  # see check_statistics
    run = ops.forward_op if torch.compiler.is_compiling() else ops.forward_impl
    return run(
        input.contiguous(memory_format=last), conv_weight.contiguous(memory_format=last),
        conv_bias, running_mean, running_var, weight, bias, residual, eps, name, param,
        kernel.shape.as_list(), kernel.config.as_list(),
    )  # fmt: skip
