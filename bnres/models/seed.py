"""The nets of the course the project starts from (d2l.ai: batch normalization, ResNet)."""

from torch import Tensor, nn

from bnres.nn import BatchNormAct1d, BatchNormAct2d, BatchNormActMaxPool2d
from bnres.nn.conv import conv_and_norm
from bnres.nn.handout import LINKED, link, offer, take


class Residual(nn.Module):
    """3×3 convolution, BN, ReLU, 3×3 convolution, BN, add, ReLU, all convolutions with bias.

    Args:
        input_channels: channels of the input.
        num_channels: channels of the output.
        use_1x1conv: put a 1×1 convolution (without batch norm) into the shortcut.
        strides: stride of the first convolution and of the shortcut's.
    """

    fused = True

    def __init__(
        self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1
    ) -> None:
        super().__init__()
        norm = BatchNormAct2d if self.fused else nn.BatchNorm2d
        self.conv1 = nn.Conv2d(
            input_channels, num_channels, kernel_size=3, padding=1, stride=strides
        )
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        self.conv3 = None
        if use_1x1conv:
            self.conv3 = nn.Conv2d(input_channels, num_channels, kernel_size=1, stride=strides)
        self.bn1 = norm(num_channels)
        self.bn2 = norm(num_channels)

    def forward(self, x: Tensor) -> Tensor:
        x, skip = take(x)
        y = conv_and_norm(self.conv1, self.bn1, x)
        shortcut = skip if self.conv3 is None else self.conv3(skip)
        twice = getattr(self, LINKED, False)
        y = conv_and_norm(self.conv2, self.bn2, y, shortcut, twice=twice)
        return offer(*y) if twice else y

    def to_stock(self) -> None:
        """Becomes a block of torch's own layers, in place."""
        if self.fused:
            for norm in (self.bn1, self.bn2):
                assert isinstance(norm, BatchNormAct2d)
                norm.to_stock()
            self.relu = nn.ReLU(inplace=True)
            self.__class__ = StockResidual


class StockResidual(Residual):
    """`Residual` of torch's own layers, as the course writes it."""

    fused = False

    def __init__(
        self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1
    ) -> None:
        super().__init__(input_channels, num_channels, use_1x1conv, strides)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.conv3 is None else self.conv3(x)
        return self.relu(y)


def _norm_act(
    norm: nn.BatchNorm1d | nn.BatchNorm2d, act: nn.Module, fused: bool
) -> tuple[nn.Module, nn.Module]:
    """A batch norm and its activation as two layers; a fused one leaves the second nothing to do."""
    if not fused:
        return norm, act
    cls = BatchNormAct1d if isinstance(norm, nn.BatchNorm1d) else BatchNormAct2d
    return cls(norm.num_features, act_layer=type(act)), nn.Identity()


def _norm_act_pool(
    norm: nn.BatchNorm2d, act: nn.Module, pool: nn.MaxPool2d, fused: bool
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """As `_norm_act`, with a pooling behind."""
    if not fused:
        return norm, act, pool
    fused_norm = BatchNormActMaxPool2d(
        norm.num_features, pool.kernel_size, pool.stride, pool.padding, act_layer=type(act)
    )
    return fused_norm, nn.Identity(), nn.Identity()


def _stage(
    in_channels: int, channels: int, fused: bool, *, first_stage: bool = False
) -> nn.Sequential:
    """Two residual blocks, the first of which halves the size but in the first stage."""
    block = Residual if fused else StockResidual
    if first_stage:
        first = block(in_channels, channels)
    else:
        first = block(in_channels, channels, use_1x1conv=True, strides=2)
    return nn.Sequential(first, block(channels, channels))


def resnet18_seed(
    num_classes: int = 10, in_channels: int = 1, *, fused: bool = True
) -> nn.Sequential:
    """The course's ResNet-18, on (N, 1, 224, 224): a `torch.nn.Sequential` of its stages."""
    stem = nn.Sequential(
        nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3),
        *_norm_act_pool(nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1), fused),
    )
    return _resnet18(stem, num_classes, fused)


def resnet18_seed_cifar(
    num_classes: int = 10, in_channels: int = 3, *, fused: bool = True
) -> nn.Sequential:
    """The ResNet-18 of the course's augmentation chapter, for small images: no pooling."""
    stem = nn.Sequential(
        nn.Conv2d(in_channels, 64, kernel_size=3, stride=1, padding=1),
        *_norm_act(nn.BatchNorm2d(64), nn.ReLU(), fused),
    )
    return _resnet18(stem, num_classes, fused)


def _resnet18(stem: nn.Module, num_classes: int, fused: bool) -> nn.Sequential:
    """The stages behind a stem, and the classifier."""
    net = nn.Sequential(
        stem,
        _stage(64, 64, fused, first_stage=True),
        _stage(64, 128, fused),
        _stage(128, 256, fused),
        _stage(256, 512, fused),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )
    if fused:
        link(m for m in net.modules() if isinstance(m, Residual))
    return net


def lenet_seed(num_classes: int = 10, in_channels: int = 1, *, fused: bool = True) -> nn.Sequential:
    """The course's LeNet with batch norm and sigmoids, on (N, 1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, kernel_size=5),
        *_norm_act_pool(nn.BatchNorm2d(6), nn.Sigmoid(), nn.MaxPool2d(2), fused),
        nn.Conv2d(6, 16, kernel_size=5),
        *_norm_act_pool(nn.BatchNorm2d(16), nn.Sigmoid(), nn.MaxPool2d(2), fused),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 120),
        *_norm_act(nn.BatchNorm1d(120), nn.Sigmoid(), fused),
        nn.Linear(120, 84),
        *_norm_act(nn.BatchNorm1d(84), nn.Sigmoid(), fused),
        nn.Linear(84, num_classes),
    )
