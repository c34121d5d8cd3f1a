"""Models, functions that return models, and objects that bnres must refuse.

On the command line they are written ``tests.own_models:NAME``.
"""

import os
import signal

import torch
from torch import nn

NUMBER = 3
MODULE = nn.Linear(2, 2)


class Net(nn.Module):
    """A convolution, a residual block and a classifier."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.norm(self.conv(x)) + x)
        return self.head(x.mean((2, 3)))


def gray(num_classes: int) -> nn.Module:
    return Net(num_classes, 1)


def by_chans(num_classes: int = 5, in_chans: int = 3) -> nn.Module:
    return Net(num_classes, in_chans)


def five() -> nn.Module:
    return Net(5, 1)


def lazy(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(num_classes))


def deep(depth: int) -> nn.Module:
    return Net(depth, 1)


def frozen(num_classes: int) -> nn.Module:
    return Net(num_classes, 1).requires_grad_(False)


class Dies(Net):
    """Kills the process of rank 1 in training batch number $DIES_AT, but not after a restart."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, 1)
        self.batches = 0

    @torch.compiler.disable
    def count(self) -> None:
        self.batches += 1
        first = os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and self.batches == int(os.environ["DIES_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            self.count()
        return super().forward(x)


def text() -> str:
    return "net"


def compiled(num_classes: int) -> nn.Module:
    return torch.compile(Net(num_classes, 1), backend="eager")  # type: ignore[return-value]


def traced(num_classes: int) -> nn.Module:
    return torch.jit.trace(Net(num_classes, 1), torch.zeros(2, 1, 8, 8))  # type: ignore[no-any-return]


class TwoHeads(Net):
    """A model that returns two outputs in training mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return (y, y) if self.training else y  # type: ignore[return-value]


class TwoInputs(Net):
    """A model that needs a second input."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x + y)


class NoImages(Net):
    """A model whose input needs five dimensions, one more than images have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mean(4))
