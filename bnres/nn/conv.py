"""A convolution followed by a batch norm."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from bnres.nn.batchnorm import BatchNormAct2d, _FusedForward
from bnres.nn.hooks import hooked, make_leaf
from bnres.nn.state import group_of, next_state, normalizes_by_batch
from bnres.nn.sync import SyncBatchNorm
from bnres.operations.conv_batch_norm_act import conv2d_batch_norm_act
from bnres.operations.stem_conv import KERNEL, PADDING, STRIDE, stem_conv2d


class ConvBatchNormAct2d(nn.Module):
    """Computes act(bn(conv(input)) + residual) on an input (N, C, H, W).

    The residual is optional. The arguments are as in `torch.nn.Conv2d`, but ``bias`` is False by
    default. ``options`` are arguments of `BatchNormAct2d`. The keys of the state dict are
    ``conv.*`` and ``bn.*``.

    Raises:
        ValueError: for an unknown activation or option, or if `torch.nn.Conv2d` raises it.

    The convolution and the batch norm are those of `torch.nn.Conv2d` and `torch.nn.BatchNorm2d`
    (Ioffe and Szegedy, arXiv 1502.03167).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        make_leaf(self)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.bn = BatchNormAct2d(out_channels, device=device, dtype=dtype, **options)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return conv_and_norm(self.conv, self.bn, input, residual)


class StemConv2d(nn.Conv2d):
    """The first convolution of a ResNet, which is 7×7 with stride 2 and padding 3.

    The convolution is that of `torch.nn.Conv2d`, computed by `bnres.functional.stem_conv2d`.

    Args:
        in_channels, out_channels, bias, device, dtype: as in `torch.nn.Conv2d`, but ``bias`` is
            False by default.

    Raises:
        ValueError: if `torch.nn.Conv2d` raises it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, KERNEL, STRIDE, PADDING, bias=bias, device=device,
            dtype=dtype,
        )  # fmt: skip
        make_leaf(self)

    def forward(self, input: Tensor) -> Tensor:
        found = self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        if found != ((STRIDE,) * 2, (PADDING,) * 2, (1, 1), 1, "zeros"):  # changed by the user
            return super().forward(input)
        return stem_conv2d(input, self.weight, self.bias)


def conv_and_norm(
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    input: Tensor,
    residual: Tensor | None = None,
    shortcut: nn.Sequential | None = None,
    *,
    fork: bool = False,
) -> Any:
    """Returns act(bn(conv(input)) + shortcut(residual)), or with ``fork`` this result twice.

    ``shortcut`` is a convolution followed by a batch norm. If ``shortcut`` is None, ``residual`` is
    added unchanged. If ``bn`` is not a module of `bnres.nn`, there is no activation, and each
    module is called separately. Otherwise the batch norms, the addition and the activation of
    ``bn`` run as one operation, unless a module has a hook.
    """
    # In a graph that bnres.fuse captures, each module must have its own call.
    captured = isinstance(bn, SyncBatchNorm) and is_compiling()
    if captured or not isinstance(bn, _FusedForward):
        y = bn(conv(input))
        if residual is not None:
            y = y + (residual if shortcut is None else shortcut(residual))
        return (y, y) if fork else y
    # torch.fx traces with proxies instead of tensors. In its graph, too, each module must have its
    # own call.
    if isinstance(input, Tensor) and not hooked(conv, bn, shortcut, *(shortcut or ())):
        if shortcut is not None:
            residual_conv, residual_norm = shortcut
            y, residual = conv(input), residual_conv(residual)
            return bn(y, residual, residual_norm=residual_norm, fork=fork)
        if group_of(bn) is not None:
            return bn(conv(input), residual, fork=fork)
        bn._check_input_dim(input)
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            sizes = conv._reversed_padding_repeated_twice
            input, padding = F.pad(input, sizes, mode=conv.padding_mode), 0
        s = next_state(bn)
        return conv2d_batch_norm_act(
            input, conv.weight, conv.bias, s.running_mean, s.running_var, s.weight, s.bias,
            stride=conv.stride, padding=padding, dilation=conv.dilation, groups=conv.groups,
            residual=residual, act=bn.act, act_kwargs=bn.act_kwargs,
            training=normalizes_by_batch(bn), momentum=s.momentum, eps=s.eps,
            num_batches_tracked=s.num_batches_tracked, fork=fork,
        )  # fmt: skip
    y = bn(conv(input), residual if shortcut is None else shortcut(residual))
    return (y, y) if fork else y
