"""Fused calls of batch norm modules, torch's own ones included, and of convolutions before them.

A module's mode, momentum and eps are read at each call.
"""

from typing import Any

from torch import Tensor, nn

from bnres.backend import uses_kernels
from bnres.nn.state import Norm, next_state, normalizes_by_batch
from bnres.operations.batch_norm_act import batch_norm_act
from bnres.operations.batch_norm_act_max_pool import batch_norm_act_max_pool2d
from bnres.operations.conv_batch_norm_act import conv2d_batch_norm_act

Act = str | type[nn.Module] | None


def norm_add_act(
    bn: Norm,
    input: Tensor,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: Act = None,
    act_kwargs: dict[str, Any] | None = None,
    *,
    input_bias: Tensor | None = None,
    residual_input_bias: Tensor | None = None,
    fork: bool = False,
) -> Any:
    """act(bn(input + input_bias) + residual), or + residual_norm(residual + residual_input_bias).

    Raises:
        ValueError: for input with the wrong number of dimensions, and for a ``residual_norm``
            without a residual.
    """
    bn._check_input_dim(input)
    training, other = normalizes_by_batch(bn), None
    if residual_norm is not None:
        if residual is not None and normalizes_by_batch(residual_norm) != training:
            # One of them is frozen: they need different passes.
            residual = norm_add_act(residual_norm, residual, input_bias=residual_input_bias)
        else:
            if residual is not None:
                residual_norm._check_input_dim(residual)
            other = next_state(residual_norm, residual_input_bias)
    s = next_state(bn)
    return batch_norm_act(
        input, s.running_mean, s.running_var, s.weight, s.bias, input_bias=input_bias,
        residual=residual, residual_norm=other, act=act, act_kwargs=act_kwargs, training=training,
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
        bn._check_input_dim(input)
        s = next_state(bn)
        return conv2d_batch_norm_act(
            input, conv.weight, conv.bias, s.running_mean, s.running_var, s.weight, s.bias,
            stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
            residual=residual, training=normalizes_by_batch(bn), momentum=s.momentum, eps=s.eps,
            num_batches_tracked=s.num_batches_tracked, **options,
        )  # fmt: skip
    input, input_bias = _convolve(conv, input)
    residual_input_bias = None
    if residual is not None:
        residual, residual_input_bias = _convolve(residual_conv, residual)
    return norm_add_act(
        bn, input, residual, residual_norm, input_bias=input_bias,
        residual_input_bias=residual_input_bias, **options,
    )  # fmt: skip


def _convolve(conv: nn.Conv2d | None, input: Tensor) -> tuple[Tensor, Tensor | None]:
    """conv(input), and the bias that the batch norm still has to add, or None."""
    if conv is None:
        return input, None
    if conv.bias is None or not uses_kernels(input):
        return conv(input), None
    return conv._conv_forward(input, conv.weight, None), conv.bias


def norm_act_pool(
    bn: Norm,
    input: Tensor,
    pool: Any,
    act: Act = None,
    act_kwargs: dict[str, Any] | None = None,
    conv: nn.Conv2d | None = None,
) -> Tensor:
    """max_pool2d(act(bn(conv(input)))); ``pool`` has the attributes of `torch.nn.MaxPool2d`."""
    bn._check_input_dim(input)
    x, input_bias = _convolve(conv, input)
    return batch_norm_act_max_pool2d(
        x, kernel_size=pool.kernel_size, stride=pool.stride, padding=pool.padding,
        dilation=pool.dilation, ceil_mode=pool.ceil_mode, act=act, act_kwargs=act_kwargs,
        training=normalizes_by_batch(bn), **next_state(bn, input_bias)._asdict(),
    )  # fmt: skip
