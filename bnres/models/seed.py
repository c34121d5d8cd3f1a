"""The nets of the course the project starts from (d2l.ai: batch normalization, ResNet)."""

from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from bnres.models.layers import NormAct, fused_norm_act, stock_norm_act
from bnres.nn.conv import conv_and_norm
from bnres.nn.handout import link, linked, offer, take


class Residual(nn.Module):
    """3×3 convolution, BN, ReLU, 3×3 convolution, BN, add, ReLU, all convolutions with bias.

    Args:
        input_channels: channels of the input.
        num_channels: channels of the output.
        use_1x1conv: put a 1×1 convolution (without batch norm) into the shortcut.
        strides: stride of the first convolution and of the shortcut's.
        norm_act: builds each batch norm and the activation after it, see `bnres.models.layers`.
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

    def forward(self, x: Tensor) -> Tensor:
        x, skip = take(x)
        x = self.act1(conv_and_norm(self.conv1, self.bn1, x))
        if self.conv3 is not None:
            skip = self.conv3(skip)
        y = conv_and_norm(self.conv2, self.bn2, x, skip, fork=linked(self))
        return self.act2(offer(y))


def _resnet18(
    conv: nn.Conv2d, num_classes: int, fused: bool, pool: nn.MaxPool2d | None = None
) -> nn.Sequential:
    """A stem that begins with ``conv``, four stages of two blocks each, and the classifier."""
    norm_act = fused_norm_act if fused else stock_norm_act
    net = nn.Sequential(
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
    link(m for m in net.modules() if isinstance(m, Residual))
    return net


def resnet18_seed(
    num_classes: int = 10, in_channels: int = 1, *, fused: bool = True
) -> nn.Sequential:
    """The course's ResNet-18, on (N, 1, 224, 224): a `torch.nn.Sequential` of its stages."""
    conv = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3)
    return _resnet18(conv, num_classes, fused, nn.MaxPool2d(3, 2, 1))


def resnet18_seed_cifar(
    num_classes: int = 10, in_channels: int = 3, *, fused: bool = True
) -> nn.Sequential:
    """The ResNet-18 of the course's augmentation chapter, for small images: no pooling."""
    conv = nn.Conv2d(in_channels, 64, kernel_size=3, stride=1, padding=1)
    return _resnet18(conv, num_classes, fused)


def lenet_seed(num_classes: int = 10, in_channels: int = 1, *, fused: bool = True) -> nn.Sequential:
    """The course's LeNet with batch norm and sigmoids, on (N, 1, 28, 28)."""
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
