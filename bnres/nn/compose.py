"""Fused calls of batch norm modules, torch's own ones included, and of convolutions before them.

A module's mode, momentum and eps are read at each call.
"""

from typing import Any

from torch import Tensor, nn

from bnres.nn.state import Norm, last_momentum, next_state, normalizes_by_batch
from bnres.operations.batch_norm_act import batch_norm_act
from bnres.operations.batch_norm_act_max_pool import batch_norm_act_max_pool2d
from bnres.operations.conv_batch_norm_act import (
    absorb_bias,
    conv2d_batch_norm_act,
    shift_running_mean,
)

Act = str | type[nn.Module] | None


def norm_add_act(
    bn: Norm,
    input: Tensor,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: Act = None,
    act_kwargs: dict[str, Any] | None = None,
    *,
    fork: bool = False,
) -> Any:
    """act(bn(input) + residual), or act(bn(input) + residual_norm(residual)).

    Raises:
        ValueError: for a ``residual_norm`` without a residual.
    """
    training, other = normalizes_by_batch(bn), None
    if residual_norm is not None:
        if residual is not None and normalizes_by_batch(residual_norm) != training:
            # One of them is frozen: they need different passes.
            residual = norm_add_act(residual_norm, residual)
        else:
            other = next_state(residual_norm)
    s = next_state(bn)
    return batch_norm_act(
        input, s.running_mean, s.running_var, s.weight, s.bias, residual=residual,
        residual_norm=other, act=act, act_kwargs=act_kwargs, training=training,
        momentum=s.momentum, eps=s.eps, num_batches_tracked=s.num_batches_tracked, fork=fork,
    )  # fmt: skip


def conv_norm_add_act(
    conv: nn.Conv2d | None,
    bn: Norm,
    input: Tensor,
    residual: Tensor | None = None,
    residual_conv: Any = None,
    residual_norm: Any = None,
    act: Act = None,
    act_kwargs: dict[str, Any] | None = None,
    *,
    fork: bool = False,
) -> Any:
    """act(bn(conv(input)) + residual), or + residual_norm(residual_conv(residual))."""
    options: dict[str, Any] = {"act": act, "act_kwargs": act_kwargs, "fork": fork}
    if conv is not None and residual_norm is None and conv.padding_mode == "zeros":
        return conv2d_batch_norm_act(
            input, conv.weight, conv.bias, stride=conv.stride, padding=conv.padding,
            dilation=conv.dilation, groups=conv.groups, residual=residual,
            training=normalizes_by_batch(bn), **options, **next_state(bn)._asdict(),
        )  # fmt: skip
    x = _convolve(conv, bn, input)
    if residual is not None:
        residual = _convolve(residual_conv, residual_norm, residual)
    y = norm_add_act(bn, x, residual, residual_norm, **options)
    _shift(bn, conv, x)
    _shift(residual_norm, residual_conv, x)
    return y


def _convolve(conv: nn.Conv2d | None, bn: Norm, input: Tensor) -> Tensor:
    """conv(input), without the bias where ``bn`` cancels it; the input where there is no ``conv``."""
    if conv is None:
        return input
    if conv.bias is None or not normalizes_by_batch(bn):
        return conv(input)
    return absorb_bias(conv._conv_forward(input, conv.weight, None), conv.bias)


def _shift(bn: Norm, conv: nn.Conv2d | None, x: Tensor) -> None:
    """After a call of ``bn``: adds to the running mean what `_convolve` left out."""
    if conv is None or conv.bias is None or not x.numel():
        return
    if bn.training and bn.track_running_stats:
        shift_running_mean(bn.running_mean, conv.bias, last_momentum(bn))


def norm_act_pool(
    bn: Norm,
    input: Tensor,
    pool: Any,
    act: Act = None,
    act_kwargs: dict[str, Any] | None = None,
    conv: nn.Conv2d | None = None,
) -> Tensor:
    """max_pool2d(act(bn(conv(input)))); ``pool`` has the attributes of `torch.nn.MaxPool2d`."""
    x = _convolve(conv, bn, input)
    y = batch_norm_act_max_pool2d(
        x, kernel_size=pool.kernel_size, stride=pool.stride, padding=pool.padding,
        dilation=pool.dilation, ceil_mode=pool.ceil_mode, act=act, act_kwargs=act_kwargs,
        training=normalizes_by_batch(bn), **next_state(bn)._asdict(),
    )  # fmt: skip
    _shift(bn, conv, x)
    return y
