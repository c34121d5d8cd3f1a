"""ResNets with torchvision's parameter names and numerics, of fused or of stock layers."""

from typing import Any

from torch import Tensor, nn

from bnres.activations import as_module
from bnres.models.blocks import (
    BasicBlock,
    Bottleneck,
    FusedBasicBlock,
    FusedBottleneck,
    ResidualBlock,
)
from bnres.nn import BatchNormAct2d, BatchNormActMaxPool2d
from bnres.nn.handout import link

STEMS = ("imagenet", "cifar")


class ResNet(nn.Module):
    """A ResNet (He et al., arXiv 1512.03385) on (N, in_channels, H, W), returning (N, num_classes).

    Args:
        block: class of the residual block.
        depths: blocks in each of the four stages.
        num_classes: size of the output.
        in_channels: channels of the input.
        stem: ``"imagenet"`` (7×7, stride 2, max-pool) or ``"cifar"`` (3×3, stride 1, no pool).
        act: name of the activation.
        zero_init_residual: start the last weight of each block's batch norms at zero.

    Raises:
        ValueError: for an unknown stem or activation.
    """

    def __init__(
        self,
        block: type[ResidualBlock],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        stem: str = "imagenet",
        act: str = "relu",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        imagenet = stem == "imagenet"
        if imagenet:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = _stem_norm(block.fused, imagenet, act)
        self.relu = nn.Identity() if block.fused else as_module(act)
        pools = imagenet and not block.fused  # a fused stem pools in its batch norm
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pools else nn.Identity()
        expansion = block.expansion
        self.layer1 = _stage(block, 64, 64, depths[0], 1, act)
        self.layer2 = _stage(block, 64 * expansion, 128, depths[1], 2, act)
        self.layer3 = _stage(block, 128 * expansion, 256, depths[2], 2, act)
        self.layer4 = _stage(block, 256 * expansion, 512, depths[3], 2, act)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(512 * expansion, num_classes)
        self._initialize(zero_init_residual)
        if block.fused:
            link(m for m in self.modules() if isinstance(m, ResidualBlock))

    def _initialize(self, zero_init_residual: bool) -> None:
        """He's initialisation of the convolutions, torch's own of the rest."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, ResidualBlock):
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.flatten(self.avgpool(x)))

    def to_stock(self) -> None:
        """Gets a stem of torch's own layers, in place."""
        if isinstance(self.bn1, BatchNormAct2d):
            for name, module in zip(("relu", "maxpool"), self.bn1.to_stock(), strict=False):
                setattr(self, name, module)


def _stem_norm(fused: bool, pools: bool, act: str) -> nn.BatchNorm2d:
    """The stem's batch norm, and what it takes in of what follows."""
    if not fused:
        return nn.BatchNorm2d(64)
    if pools:
        return BatchNormActMaxPool2d(64, kernel_size=3, stride=2, padding=1, act_layer=act)
    return BatchNormAct2d(64, act_layer=act)


def _stage(
    block: type[ResidualBlock], in_channels: int, channels: int, depth: int, stride: int, act: str
) -> nn.Sequential:
    """``depth`` blocks, of which the first has the stride."""
    out_channels = channels * block.expansion
    return nn.Sequential(
        block(in_channels, channels, stride, act),
        *(block(out_channels, channels, 1, act) for _ in range(depth - 1)),
    )


def resnet18(
    num_classes: int = 1000, in_channels: int = 3, *, fused: bool = True, **options: Any
) -> ResNet:
    """ResNet-18; ``options`` are those of `ResNet`, ``fused=False`` takes torch's own layers."""
    block = FusedBasicBlock if fused else BasicBlock
    return ResNet(block, (2, 2, 2, 2), num_classes, in_channels, **options)


def resnet34(
    num_classes: int = 1000, in_channels: int = 3, *, fused: bool = True, **options: Any
) -> ResNet:
    """ResNet-34; ``options`` are those of `ResNet`, ``fused=False`` takes torch's own layers."""
    block = FusedBasicBlock if fused else BasicBlock
    return ResNet(block, (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet50(
    num_classes: int = 1000, in_channels: int = 3, *, fused: bool = True, **options: Any
) -> ResNet:
    """ResNet-50; ``options`` are those of `ResNet`, ``fused=False`` takes torch's own layers."""
    block = FusedBottleneck if fused else Bottleneck
    return ResNet(block, (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet101(
    num_classes: int = 1000, in_channels: int = 3, *, fused: bool = True, **options: Any
) -> ResNet:
    """ResNet-101; ``options`` are those of `ResNet`, ``fused=False`` takes torch's own layers."""
    block = FusedBottleneck if fused else Bottleneck
    return ResNet(block, (3, 4, 23, 3), num_classes, in_channels, **options)


def resnet152(
    num_classes: int = 1000, in_channels: int = 3, *, fused: bool = True, **options: Any
) -> ResNet:
    """ResNet-152; ``options`` are those of `ResNet`, ``fused=False`` takes torch's own layers."""
    block = FusedBottleneck if fused else Bottleneck
    return ResNet(block, (3, 8, 36, 3), num_classes, in_channels, **options)
