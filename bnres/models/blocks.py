"""Residual blocks, built from torch's layers or from fused layers.

The parameters have the same names in both cases. With ``block(x, skip, fork=True)``, the block's
shortcut reads ``skip`` instead of ``x``, and the block returns its output as two tensors.
`bnres.models.chain` explains why. ``block.readers()`` returns the modules that may read the block's
input, and None for a missing shortcut.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from bnres.models.layers import NormAct, fused_norm_act
from bnres.nn.conv import conv_and_norm
from bnres.nn.hooks import hooked


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Returns a convolution without bias. With stride 1 it keeps the height and the width."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )


def projection(
    in_channels: int, out_channels: int, stride: int, norm_act: NormAct
) -> nn.Sequential | None:
    """Returns a block's shortcut: a 1×1 convolution followed by a batch norm.

    Returns None if the block's output has the same shape as its input.
    """
    if stride == 1 and in_channels == out_channels:
        return None
    norm, _ = norm_act(out_channels, act=None)
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), norm)


def _end(
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    act: nn.Module,
    x: Tensor,
    skip: Tensor,
    shortcut: nn.Sequential | None = None,
    *,
    fork: bool,
) -> Any:
    """Returns act(bn(conv(x)) + shortcut(skip)), or with ``fork`` this result twice.

    If ``act`` is an identity, ``bn`` includes the activation, and one fused operation returns both.
    """
    if fork and type(act) is nn.Identity and not hooked(act):
        return conv_and_norm(conv, bn, x, skip, shortcut, fork=True)
    y = act(conv_and_norm(conv, bn, x, skip, shortcut))
    return (y, y) if fork else y


class BasicBlock(nn.Module):
    """A residual block with two 3×3 convolutions (He et al., arXiv 1512.03385).

    The block computes: 3×3 convolution, BN, ReLU, 3×3 convolution, BN, add, ReLU.

    Args:
        in_channels: number of channels of the input.
        channels: number of channels of the 3×3 convolutions. The output has ``expansion`` times as
            many channels.
        stride: stride of the block.
        norm_act: a function that builds a batch norm and the activation after it, see
            `bnres.models.layers`.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, norm_act: NormAct = fused_norm_act
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1, self.act1 = norm_act(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2, self.act2 = norm_act(channels)
        self.downsample = projection(in_channels, channels, stride, norm_act)

    def forward(self, x: Tensor, skip: Tensor | None = None, *, fork: bool = False) -> Any:
        skip = x if skip is None else skip
        x = self.act1(conv_and_norm(self.conv1, self.bn1, x))
        return _end(self.conv2, self.bn2, self.act2, x, skip, self.downsample, fork=fork)

    def readers(self) -> tuple[nn.Module | None, ...]:
        return self.conv1, self.bn2, self.downsample, *(self.downsample or ())


class Bottleneck(nn.Module):
    """A residual block with three convolutions (He et al., arXiv 1512.03385).

    The block computes: 1×1 convolution, BN, ReLU, 3×3 convolution, BN, ReLU, 1×1 convolution, BN,
    add, ReLU. As in torchvision, the 3×3 convolution has the block's stride, and the other two
    convolutions have stride 1. The arguments are the same as for `BasicBlock`.
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, norm_act: NormAct = fused_norm_act
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1, self.act1 = norm_act(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2, self.act2 = norm_act(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3, self.act3 = norm_act(out_channels)
        self.downsample = projection(in_channels, out_channels, stride, norm_act)

    def forward(self, x: Tensor, skip: Tensor | None = None, *, fork: bool = False) -> Any:
        skip = x if skip is None else skip
        x = self.act1(conv_and_norm(self.conv1, self.bn1, x))
        x = self.act2(conv_and_norm(self.conv2, self.bn2, x))
        return _end(self.conv3, self.bn3, self.act3, x, skip, self.downsample, fork=fork)

    def readers(self) -> tuple[nn.Module | None, ...]:
        return self.conv1, self.bn3, self.downsample, *(self.downsample or ())


class Residual(nn.Module):
    """The residual block of the d2l.ai course.

    Unlike in `BasicBlock`, the convolutions have a bias, and no batch norm follows the shortcut's
    convolution.

    Args:
        input_channels: number of channels of the input.
        num_channels: number of channels of the output.
        use_1x1conv: whether the shortcut is a 1×1 convolution. Otherwise the shortcut is the input.
        strides: stride of the first convolution and of the shortcut's convolution.
        norm_act: a function that builds a batch norm and the activation after it, see
            `bnres.models.layers`.
    """

    def __init__(
        self,
        input_channels: int,
        num_channels: int,
        use_1x1conv: bool = False,
        strides: int = 1,
        norm_act: NormAct = fused_norm_act,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            input_channels, num_channels, kernel_size=3, padding=1, stride=strides
        )
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        self.conv3 = None
        if use_1x1conv:
            self.conv3 = nn.Conv2d(input_channels, num_channels, kernel_size=1, stride=strides)
        self.bn1, self.act1 = norm_act(num_channels)
        self.bn2, self.act2 = norm_act(num_channels)

    def forward(self, x: Tensor, skip: Tensor | None = None, *, fork: bool = False) -> Any:
        skip = x if skip is None else skip
        x = self.act1(conv_and_norm(self.conv1, self.bn1, x))
        if self.conv3 is not None:
            skip = self.conv3(skip)
        return _end(self.conv2, self.bn2, self.act2, x, skip, fork=fork)

    def readers(self) -> tuple[nn.Module | None, ...]:
        return self.conv1, self.bn2, self.conv3
