"""act(bn(conv2d(x)) + residual) by one kernel, for inference."""

import torch
from torch import Tensor

from bnres.kernels.conv_config import ConvConfig, ConvShape
from bnres.kernels.norm import Norm, RunningStatistics


def forward_impl(
    x: Tensor,
    filter: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    act_param: float,
    shape: list[int],
    config: list[int] | None,
) -> Tensor:
    """y; ``shape`` and ``config`` hold the fields of `ConvShape` and `ConvConfig`."""
    from bnres.kernels.conv import conv_bn_act

    norm = Norm(RunningStatistics(running_mean, running_var, eps), weight, bias)
    return conv_bn_act(
        x, filter, conv_bias, norm, residual, act, act_param, ConvShape(*shape),
        config=None if config is None else ConvConfig(*config),
    )  # fmt: skip


forward_op = torch.library.custom_op(
    "bnres::conv2d_batch_norm_act_forward", forward_impl, mutates_args=()
)


@forward_op.register_fake
def _(
    x, filter, conv_bias, running_mean, running_var, weight, bias, residual, eps, act, act_param,
    shape, config,
):  # fmt: skip
    size = ConvShape(*shape).output_size(*x.shape[2:])
    return torch.empty(
        (x.shape[0], filter.shape[0], *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
