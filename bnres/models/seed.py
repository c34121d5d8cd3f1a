"""The networks of the d2l.ai course's chapters on batch norm, ResNet and image augmentation."""

from functools import partial
from itertools import pairwise

from torch import nn

from bnres.models.blocks import Residual
from bnres.models.chain import Chain
from bnres.models.layers import fused_norm_act, stock_norm_act


def _resnet18(
    conv: nn.Conv2d, num_classes: int, fused: bool, pool: nn.MaxPool2d | None = None
) -> nn.Sequential:
    """Returns a ResNet-18: a stem that starts with ``conv``, four stages of two blocks, a head."""
    norm_act = fused_norm_act if fused else stock_norm_act
    return Chain(
        nn.Sequential(conv, *norm_act(64, pool=pool)),
        *(
            nn.Sequential(
                Residual(before, channels, before != channels, channels // before, norm_act),
                Residual(channels, channels, norm_act=norm_act),
            )
            for before, channels in pairwise((64, 64, 128, 256, 512))
        ),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )


def resnet18_seed(
    num_classes: int = 10, in_channels: int = 1, *, fused: bool = True
) -> nn.Sequential:
    """Returns the course's ResNet-18 for inputs (N, 1, 224, 224), as a sequence of stages."""
    conv = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3)
    return _resnet18(conv, num_classes, fused, nn.MaxPool2d(3, 2, 1))


def resnet18_seed_cifar(
    num_classes: int = 10, in_channels: int = 3, *, fused: bool = True
) -> nn.Sequential:
    """Returns the ResNet-18 of the course's augmentation chapter. It has no max-pool."""
    conv = nn.Conv2d(in_channels, 64, kernel_size=3, stride=1, padding=1)
    return _resnet18(conv, num_classes, fused)


def lenet_seed(num_classes: int = 10, in_channels: int = 1, *, fused: bool = True) -> nn.Sequential:
    """Returns the course's LeNet with batch norm and sigmoids, for inputs (N, 1, 28, 28)."""
    norm_act = partial(fused_norm_act if fused else stock_norm_act, act="sigmoid")
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, kernel_size=5),
        *norm_act(6, pool=nn.MaxPool2d(2)),
        nn.Conv2d(6, 16, kernel_size=5),
        *norm_act(16, pool=nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 120),
        *norm_act(120, dims=1),
        nn.Linear(120, 84),
        *norm_act(84, dims=1),
        nn.Linear(84, num_classes),
    )
