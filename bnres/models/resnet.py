"""ResNets of fused layers or of torch's layers.

With the default stem and activation, the parameters have the same names as in torchvision. If their
values are equal too, the outputs are equal up to rounding.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from bnres.models.blocks import BasicBlock, Bottleneck
from bnres.models.chain import Chain, run
from bnres.models.layers import fused_norm_act, stock_norm_act
from bnres.nn import StemConv2d

STEMS = ("imagenet", "cifar")


class ResNet(nn.Module):
    """A ResNet (He et al., arXiv 1512.03385).

    It maps inputs (N, in_channels, H, W) to outputs (N, num_classes).

    Args:
        block: class of the residual block.
        depths: number of blocks in each of the four stages.
        num_classes: number of classes.
        in_channels: number of channels of the input.
        fused: whether to use fused layers instead of torch's layers.
        stem: ``"imagenet"`` means a 7×7 convolution of stride 2 and a max-pool. ``"cifar"`` means a
            3×3 convolution of stride 1 and no pooling.
        act: name of the activation.
        zero_init_residual: whether to initialise the weight of each block's last batch norm to 0.

    Raises:
        ValueError: if the stem or the activation is unknown.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        fused: bool = True,
        stem: str = "imagenet",
        act: str = "relu",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        norm_act = partial(fused_norm_act if fused else stock_norm_act, act=act)
        if stem == "imagenet":
            if fused:
                self.conv1: nn.Conv2d = StemConv2d(in_channels, 64)
            else:
                self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            self.bn1, self.relu, self.maxpool = norm_act(64, pool=nn.MaxPool2d(3, 2, padding=1))
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
            self.bn1, self.relu = norm_act(64)
            self.maxpool = nn.Identity()
        width, stages = 64, []
        for channels, depth, stride in zip((64, 128, 256, 512), depths, (1, 2, 2, 2), strict=True):
            blocks = [block(width, channels, stride, norm_act)]
            width = channels * block.expansion
            blocks += [block(width, channels, 1, norm_act) for _ in range(depth - 1)]
            stages.append(Chain(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, num_classes)
        # Convolutions get He's initialisation. The other layers keep torch's by default.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        stem = (self.conv1, self.bn1, self.relu, self.maxpool)
        x = run((*stem, self.layer1, self.layer2, self.layer3, self.layer4), x)
        return self.fc(self.flatten(self.avgpool(x)))


def resnet18(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """Returns a ResNet-18. ``options`` are arguments of `ResNet`, such as ``fused=False``."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, **options)


def resnet34(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """Returns a ResNet-34. ``options`` are arguments of `ResNet`, such as ``fused=False``."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet50(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """Returns a ResNet-50. ``options`` are arguments of `ResNet`, such as ``fused=False``."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet101(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """Returns a ResNet-101. ``options`` are arguments of `ResNet`, such as ``fused=False``."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, in_channels, **options)


def resnet152(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """Returns a ResNet-152. ``options`` are arguments of `ResNet`, such as ``fused=False``."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, in_channels, **options)
