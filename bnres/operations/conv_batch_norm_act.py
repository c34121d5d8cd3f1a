"""Computes act(batch_norm(conv2d(x)) + residual)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.activations import resolve
from bnres.backend import uses_kernels
from bnres.kernels.conv_config import ConvConfig, ConvShape
from bnres.kernels.norm import Norm, RunningStatistics
from bnres.kernels.outputs import empty_convolved
from bnres.operations.arguments import (
    check_conv_bias,
    check_norm,
    check_residual,
    packed,
    wants_grad,
)
from bnres.operations.batch_norm_act import batch_norm_act
from bnres.operations.call import needs_aten
from bnres.operations.conv_route import Size, kernel_conv
from bnres.operations.norms import BatchNormState
from bnres.operations.operator import Maybe, Recording, operator
from bnres.routes import kernel_may_run


class Inputs(NamedTuple):
    """The tensors that the kernel reads."""

    x: Tensor
    filter: Tensor
    conv_bias: Maybe
    running_mean: Maybe
    running_var: Maybe
    weight: Maybe
    bias: Maybe
    residual: Maybe


class Spec(NamedTuple):
    """The arguments that are not tensors.

    ``shape`` and ``config`` have the fields of `ConvShape` and `ConvConfig`.
    """

    act: str
    act_param: float
    eps: float
    shape: tuple[int, ...]
    config: tuple[int, ...]


class Outputs(NamedTuple):
    """The tensors that the kernel writes."""

    y: Tensor


def _allocate(inputs: Inputs, spec: Spec) -> Outputs:
    shape = ConvShape(*spec.shape)
    return Outputs(empty_convolved(inputs.x, inputs.filter.shape[0], shape))


def _forward(inputs: Inputs, spec: Spec, recording: Recording) -> Outputs:
    outputs = _allocate(inputs, spec)
    recording.forward.run(_launch_forward, (inputs, outputs), spec)
    return outputs


def _launch_forward(inputs: Inputs, outputs: Outputs, spec: Spec) -> None:
    from bnres.kernels.conv import conv_bn_act

    i = inputs
    norm = Norm(RunningStatistics(i.running_mean, i.running_var, spec.eps), i.weight, i.bias)
    conv_bn_act(
        i.x, i.filter, i.conv_bias, norm, i.residual, spec.act, spec.act_param,
        ConvShape(*spec.shape), config=ConvConfig(*spec.config), out=outputs.y,
    )  # fmt: skip


_run_forward = operator(
    "conv2d_batch_norm_act_forward", _forward, _allocate,
    tensors=(Inputs,), options=(Spec,), outputs=Outputs,
)  # fmt: skip


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
    fork: bool = False,
) -> Any:
    """Computes ``act(batch_norm(conv2d(input)) + residual)`` in fused kernels.

    In training, or if gradients are needed, torch's convolution runs, followed by
    `batch_norm_act`. In evaluation without gradients, one kernel computes everything if
    ``bnres tune`` has measured that this kernel is faster on this GPU, or if `bnres.use_conv_route`
    requests the kernel. `bnres.routes` explains this choice. In fp32 the kernel runs only if
    ``torch.backends.cudnn.allow_tf32`` is True, which is torch's default.

    In training the result does not depend on ``conv_bias``, because subtracting the batch's mean
    cancels the bias. The bias changes only the running mean, and the gradient of the bias is zero.

    Args:
        input: (N, C, H, W). Under autocast it is cast as in `torch.nn.functional.conv2d`.
        conv_weight: (K, C / groups, R, S).
        conv_bias: (K,) or None.
        running_mean, running_var, weight, bias: (K,) or None, as in `batch_norm_act`.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        residual: (N, K, OH, OW) like the output, or None. It is added before the activation.
        act, act_kwargs, training, momentum, eps, num_batches_tracked, fork: as in
            `batch_norm_act`.

    Returns:
        (N, K, OH, OW). With ``fork``, two such tensors.

    Raises:
        ValueError: if ``input`` or ``conv_weight`` is not 4-D, if ``conv_bias`` has the wrong
            shape, or if `batch_norm_act` raises it.
        TypeError: if `batch_norm_act` raises it.
        RuntimeError: if ``conv_bias`` and ``conv_weight`` are on different devices, or if
            `torch.nn.functional.conv2d` or `batch_norm_act` raises it.

    The convolution and the batch norm are those of `torch.nn.functional.conv2d` and
    `torch.nn.functional.batch_norm` (Ioffe and Szegedy, arXiv 1502.03167).
    """
    if input.dim() != 4:
        raise ValueError(f"expected 4D input (got {input.dim()}D input)")
    check_conv_bias(conv_weight, conv_bias)
    if not training and kernel_may_run(input.device):
        inputs = Inputs(
            input, conv_weight, conv_bias, running_mean, running_var, weight, bias, residual
        )
        y = _by_kernel(inputs, act, act_kwargs, eps, (stride, padding, dilation, groups))
        if y is not None:
            return (y, y) if fork else y
    by_kernels = uses_kernels(input) and not needs_aten(input, conv_weight, conv_bias)
    in_conv, in_norm = (None, conv_bias) if by_kernels else (conv_bias, None)
    x = F.conv2d(input, conv_weight, in_conv, stride, padding, dilation, groups)
    return batch_norm_act(
        x, running_mean, running_var, weight, bias, input_bias=in_norm, residual=residual, act=act,
        act_kwargs=act_kwargs, training=training, momentum=momentum, eps=eps,
        num_batches_tracked=num_batches_tracked, fork=fork,
    )  # fmt: skip


def _by_kernel(
    inputs: Inputs,
    act: str | type[torch.nn.Module] | None,
    act_kwargs: dict[str, Any] | None,
    eps: float,
    window: tuple[Size, Size | str, Size, int],
) -> Tensor | None:
    """Returns the output that our kernel computes, or None if torch's convolution must run."""
    x, filter, residual = inputs.x, inputs.filter, inputs.residual
    if wants_grad(*inputs):
        return None
    kernel = kernel_conv(x, filter, *window, residual is not None)
    if kernel is None or (residual is not None and residual.dtype != kernel.dtype):
        return None
    name, param = resolve(act, act_kwargs)
    _, _, conv_bias, *norm, _ = inputs
    check_norm(BatchNormState(*norm), filter.shape[0], x.device, training=False)
    shape, last = kernel.shape, torch.channels_last
    if residual is not None:
        size = (x.shape[0], filter.shape[0], *shape.output_size(*x.shape[2:]))
        check_residual(residual, size, x.device)
        residual = residual.contiguous(memory_format=last)
    x, filter = (t.to(kernel.dtype).contiguous(memory_format=last) for t in (x, filter))
    dense = Inputs._make([x, filter, *map(packed, (conv_bias, *norm)), residual])
    spec = Spec(name, param, eps, shape.as_tuple(), kernel.config.as_tuple())
    return _run_forward(dense, spec, recording=None).y
