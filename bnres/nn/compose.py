"""Fused calls of batch norm modules, torch's own ones included, and of convolutions before them.

What a module says at the time of the call (its mode, momentum, eps) is what counts.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from bnres.functional import (
    batch_norm_act,
    batch_norm_act_max_pool2d,
    conv2d_batch_norm_act,
    dual_batch_norm_act,
)
from bnres.functional.conv import absorb_bias, after_convolution, shift_running_mean
from bnres.functional.max_pool import Size
from bnres.nn.state import next_momentum, next_state, normalizes_by_batch

Norm = nn.modules.batchnorm._BatchNorm
Act = str | type[nn.Module] | None


class Pooling(Protocol):
    """What `torch.nn.MaxPool2d` says of its windows."""

    kernel_size: Size
    stride: Size
    padding: Size
    dilation: Size
    ceil_mode: bool


def norm_add_act(
    bn: Norm,
    input: Tensor,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: Act = None,
    act_kwargs: dict[str, Any] | None = None,
    *,
    twice: bool = False,
) -> Any:
    """act(bn(input) + residual), or act(bn(input) + residual_norm(residual)).

    Raises:
        ValueError: for a ``residual_norm`` without a residual.
    """
    options: dict[str, Any] = {"act": act, "act_kwargs": act_kwargs, "twice": twice}
    if residual_norm is None:
        return batch_norm_act(input, residual=residual, **options, **next_state(bn)._asdict())
    if residual is None:
        raise ValueError("residual must be given with residual_norm, got None")
    if normalizes_by_batch(bn) != normalizes_by_batch(residual_norm):
        # One of them is frozen: they need different passes.
        shortcut = batch_norm_act(residual, act=None, **next_state(residual_norm)._asdict())
        return batch_norm_act(input, residual=shortcut, **options, **next_state(bn)._asdict())
    state, other = next_state(bn), next_state(residual_norm)
    return dual_batch_norm_act(
        input, state.running_mean, state.running_var, state.weight, state.bias,
        residual, other.running_mean, other.running_var, other.weight, other.bias,
        training=state.training, momentum=state.momentum, eps=state.eps,
        residual_momentum=other.momentum, residual_eps=other.eps,
        num_batches_tracked=state.num_batches_tracked,
        residual_num_batches_tracked=other.num_batches_tracked, **options,
    )  # fmt: skip


def conv_norm_add_act(
    conv: nn.Conv2d,
    bn: Norm,
    input: Tensor,
    residual: Tensor | None = None,
    residual_conv: Any = None,
    residual_norm: Any = None,
    act: Act = None,
    act_kwargs: dict[str, Any] | None = None,
    *,
    twice: bool = False,
) -> Any:
    """act(bn(conv(input)) + residual); the residual may have a convolution and a norm of its own."""
    options: dict[str, Any] = {"act": act, "act_kwargs": act_kwargs, "twice": twice}
    if residual_norm is None:
        state = next_state(bn)._asdict()
        if conv.padding_mode != "zeros":
            x = conv._conv_forward(input, conv.weight, None)
            return after_convolution(x, conv.bias, residual=residual, **options, **state)
        return conv2d_batch_norm_act(
            input, conv.weight, conv.bias, stride=conv.stride, padding=conv.padding,
            dilation=conv.dilation, groups=conv.groups, residual=residual, **options, **state,
        )  # fmt: skip
    x = _convolve(conv, bn, input)
    if residual_conv is not None and residual is not None:
        residual = _convolve(residual_conv, residual_norm, residual)
    y = norm_add_act(bn, x, residual, residual_norm, **options)
    if x.numel():
        _shift(bn, conv)
        _shift(residual_norm, residual_conv)
    return y


def _convolve(conv: nn.Conv2d, bn: Norm, input: Tensor) -> Tensor:
    """conv(input), without the bias where ``bn`` cancels it."""
    if conv.bias is None or not normalizes_by_batch(bn):
        return conv(input)
    return absorb_bias(conv._conv_forward(input, conv.weight, None), conv.bias)


def _shift(bn: Norm, conv: nn.Conv2d | None) -> None:
    """After a call of ``bn``: what the bias that `_convolve` left out does to the running mean."""
    if conv is not None and conv.bias is not None and bn.training and bn.track_running_stats:
        shift_running_mean(bn.running_mean, conv.bias, next_momentum(bn))


def norm_act_pool(
    bn: Norm,
    input: Tensor,
    pool: Pooling,
    act: Act = None,
    act_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """max_pool2d(act(bn(input))) with the windows of ``pool``."""
    return batch_norm_act_max_pool2d(
        input, kernel_size=pool.kernel_size, stride=pool.stride, padding=pool.padding,
        dilation=pool.dilation, ceil_mode=pool.ceil_mode, act=act, act_kwargs=act_kwargs,
        **next_state(bn)._asdict(),
    )  # fmt: skip


def conv_norm_act_pool(
    conv: nn.Conv2d,
    bn: Norm,
    input: Tensor,
    pool: Pooling,
    act: Act = None,
    act_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """max_pool2d(act(bn(conv(input)))) with the windows of ``pool``."""
    x = _convolve(conv, bn, input)
    y = norm_act_pool(bn, x, pool, act, act_kwargs)
    if x.numel():
        _shift(bn, conv)
    return y
