"""conv2d(x) and sums of it by one kernel, for training."""

import torch
from torch import Tensor

from bnres.kernels.conv_config import ConvConfig, ConvShape


def forward_impl(
    x: Tensor, filter: Tensor, shape: list[int], config: list[int]
) -> tuple[Tensor, Tensor]:
    """y and its sums; ``shape`` and ``config`` hold the fields of `ConvShape` and `ConvConfig`."""
    from bnres.kernels.conv_sums import conv_sums

    return conv_sums(x, filter, ConvShape(*shape), config=ConvConfig(*config))


forward_op = torch.library.custom_op("bnres::conv2d_sums_forward", forward_impl, mutates_args=())


@forward_op.register_fake
def _(x, filter, shape, config):
    from bnres.kernels.conv import empty_output
    from bnres.kernels.conv_sums import split_count

    y = empty_output(x, filter, ConvShape(*shape))
    splits = split_count(y.numel() // y.shape[1], ConvConfig(*config))
    return y, x.new_empty((2 * splits + 1, y.shape[1]), dtype=torch.float64)
