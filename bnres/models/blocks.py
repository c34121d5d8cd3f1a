"""Residual blocks of the layers they are given: torch's own or fused ones, under the same names."""

from typing import ClassVar

from torch import Tensor, nn

from bnres.models.layers import NormAct, fused_norm_act
from bnres.nn.conv import conv_and_norm
from bnres.nn.handout import linked, offer, take


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size (at stride 1)."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )


def projection(
    in_channels: int, out_channels: int, stride: int, norm_act: NormAct
) -> nn.Sequential | None:
    """A shortcut's convolution and batch norm, None where the input has the output's shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    norm, _ = norm_act(out_channels, act=None)
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), norm)


class BasicBlock(nn.Module):
    """3×3 convolution, BN, ReLU, 3×3 convolution, BN, add, ReLU (He et al., arXiv 1512.03385).

    Args:
        in_channels: channels of the input.
        channels: channels of the 3×3 convolutions; the output has ``expansion`` times as many.
        stride: stride of the block.
        norm_act: builds each batch norm and the activation after it, see `bnres.models.layers`.
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

    def forward(self, x: Tensor) -> Tensor:
        x, skip = take(x)
        x = self.act1(conv_and_norm(self.conv1, self.bn1, x))
        y = conv_and_norm(self.conv2, self.bn2, x, skip, self.downsample, fork=linked(self))
        return self.act2(offer(y))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, each with BN; the stride is the 3×3's, as in torchvision.

    The arguments are those of `BasicBlock`.
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

    def forward(self, x: Tensor) -> Tensor:
        x, skip = take(x)
        x = self.act1(conv_and_norm(self.conv1, self.bn1, x))
        x = self.act2(conv_and_norm(self.conv2, self.bn2, x))
        y = conv_and_norm(self.conv3, self.bn3, x, skip, self.downsample, fork=linked(self))
        return self.act3(offer(y))
