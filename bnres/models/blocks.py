"""The two residual blocks, of stock layers and of fused ones: same parameters, same names."""

from typing import ClassVar

from torch import Tensor, nn

from bnres.activations import as_module
from bnres.nn import BatchNorm2d, BatchNormAct2d
from bnres.nn.compose import conv_norm_add_act
from bnres.nn.conv import conv_and_norm
from bnres.nn.handout import LINKED, offer, take
from bnres.nn.hooks import hooked


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size (at stride 1)."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )


class ResidualBlock(nn.Module):
    """What the blocks share: the shortcut, the activation, the kind of norm layers.

    Args:
        in_channels: channels of the input.
        channels: channels of the block's 3×3 convolutions; the output has ``expansion`` as many.
        stride: stride of the block.
        act: name of the activation.
    """

    expansion: ClassVar[int]
    fused: ClassVar[bool] = False

    def __init__(self, in_channels: int, channels: int, stride: int, act: str) -> None:
        super().__init__()
        self.act_name = act
        self.relu = nn.Identity() if self.fused else as_module(act)
        self._add_layers(in_channels, channels, stride)
        out_channels = channels * self.expansion
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                conv(in_channels, out_channels, 1, stride), self._norm(out_channels)
            )

    def _add_layers(self, in_channels: int, channels: int, stride: int) -> None:
        """Adds the convolutions and their norms."""
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The batch norm in front of the addition."""
        raise NotImplementedError

    def _norm(self, channels: int) -> nn.BatchNorm2d:
        return BatchNorm2d(channels) if self.fused else nn.BatchNorm2d(channels)

    def _norm_act(self, channels: int) -> nn.BatchNorm2d:
        """A batch norm with the activation behind it: in it, where it is fused."""
        if self.fused:
            return BatchNormAct2d(channels, act_layer=self.act_name)
        return nn.BatchNorm2d(channels)

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def _fused_end(self, conv: nn.Conv2d, x: Tensor, skip: Tensor) -> Tensor:
        """Last convolution and batch norm, shortcut, add and activation."""
        twice = getattr(self, LINKED, False)
        if self.downsample is None:
            y = conv_and_norm(conv, self.last_norm, x, skip, twice=twice)
            return offer(*y) if twice else y
        shortcut_conv, shortcut_norm = self.downsample[0], self.downsample[1]
        if hooked(conv, self.last_norm, self.downsample, shortcut_conv, shortcut_norm):
            return self.last_norm(conv(x), self.downsample(skip))
        y = conv_norm_add_act(
            conv, self.last_norm, x, skip, shortcut_conv, shortcut_norm, self.act_name, twice=twice
        )
        return offer(*y) if twice else y

    def to_stock(self) -> None:
        """Becomes a block of torch's own layers, in place."""
        if self.fused:
            for module in list(self.modules()):
                if isinstance(module, BatchNormAct2d):
                    module.to_stock()
                elif isinstance(module, BatchNorm2d):
                    module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
            self.relu = as_module(self.act_name)
            self.__class__ = type(self).__base__  # type: ignore[assignment]


class BasicBlock(ResidualBlock):
    """3×3 convolution, BN, ReLU, 3×3 convolution, BN, add, ReLU (He et al., arXiv 1512.03385)."""

    expansion = 1

    def _add_layers(self, in_channels: int, channels: int, stride: int) -> None:
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = self._norm_act(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = self._norm_act(channels)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self._shortcut(x))


class FusedBasicBlock(BasicBlock):
    """`BasicBlock` whose batch norms take in the activation, the addition and the shortcut's."""

    fused = True

    def forward(self, x: Tensor) -> Tensor:
        x, skip = take(x)
        out = conv_and_norm(self.conv1, self.bn1, x)
        return self._fused_end(self.conv2, out, skip)


class Bottleneck(ResidualBlock):
    """1×1, 3×3 and 1×1 convolutions, each with BN; the stride is the 3×3's, as in torchvision."""

    expansion = 4

    def _add_layers(self, in_channels: int, channels: int, stride: int) -> None:
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = self._norm_act(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = self._norm_act(channels)
        self.conv3 = conv(channels, channels * self.expansion, 1)
        self.bn3 = self._norm_act(channels * self.expansion)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self._shortcut(x))


class FusedBottleneck(Bottleneck):
    """`Bottleneck` whose batch norms take in the activation, the addition and the shortcut's."""

    fused = True

    def forward(self, x: Tensor) -> Tensor:
        x, skip = take(x)
        out = conv_and_norm(self.conv1, self.bn1, x)
        out = conv_and_norm(self.conv2, self.bn2, out)
        return self._fused_end(self.conv3, out, skip)
