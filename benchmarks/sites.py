"""Lists the batch norms and convolutions of ResNet-18 and ResNet-50 for images of 224×224.

A *site* stands for all batch norms, or all convolutions, of a net that have the same shape and are
followed by the same operations.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from bnres import models
from bnres.kernels.conv_config import ConvShape
from bnres.tune import conv_calls

NETS = ("resnet18", "resnet50")
IMAGE = (256, 3, 224, 224)


@dataclass(frozen=True)
class Site:
    """The batch norms of a net that have the same shape and are followed by the same operations.

    Attributes:
        name: stage of the net. If it ends in ``-entry``, the site is the batch norm before the
            stage's strided convolution.
        operation: ``bn``, ``bn_relu`` or ``bn_add_relu``, or a fused operation that can replace it.
        channels: number of channels.
        size: height and width of the activation.
        count: number of these batch norms in the net.
        net: name of the net.
    """

    name: str
    operation: str
    channels: int
    size: int
    count: int
    net: str = "resnet18"

    @property
    def id(self) -> str:
        return f"{self.net}.{self.name}"

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.size, self.size


RESNET18_SITES = (
    Site("stem", "bn_relu", 64, 112, 1),
    Site("layer1", "bn_relu", 64, 56, 2),
    Site("layer1", "bn_add_relu", 64, 56, 2),
    Site("layer2", "bn_relu", 128, 28, 2),
    Site("layer2", "bn_add_relu", 128, 28, 2),
    Site("layer2", "bn", 128, 28, 1),
    Site("layer3", "bn_relu", 256, 14, 2),
    Site("layer3", "bn_add_relu", 256, 14, 2),
    Site("layer3", "bn", 256, 14, 1),
    Site("layer4", "bn_relu", 512, 7, 2),
    Site("layer4", "bn_add_relu", 512, 7, 2),
    Site("layer4", "bn", 512, 7, 1),
)


def _resnet50_sites() -> tuple[Site, ...]:
    stem = Site("stem", "bn_relu", 64, 112, 1, "resnet50")
    stages = ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3))
    sites = [stem]
    for index, (channels, size, blocks) in enumerate(stages, 1):
        stage = Site(f"layer{index}", "bn_relu", channels, size, 2 * blocks, "resnet50")
        if index > 1:
            sites.append(replace(stage, name=f"{stage.name}-entry", size=2 * size, count=1))
            stage = replace(stage, count=stage.count - 1)
        wide = replace(stage, operation="bn_add_relu", channels=4 * channels, count=blocks)
        sites += [stage, wide, replace(wide, operation="bn", count=1)]
    return tuple(sites)


RESNET50_SITES = _resnet50_sites()


def operations_at(site: Site) -> list[Site]:
    """Lists copies of a site, one for each fused operation that can replace its operation."""
    fused = {
        "bn": ["dual_bn_add_relu"],
        "bn_add_relu": ["bn_add_relu", "bn_add_relu_fork"],
        "bn_relu": ["bn_relu", "bn_relu_pool"] if site.name == "stem" else ["bn_relu"],
    }
    return [replace(site, operation=operation) for operation in fused[site.operation]]


@dataclass(frozen=True)
class ConvSite:
    """The convolutions of a net that have the same shape, each followed by batch norm and ReLU.

    If ``has_residual`` is true, a residual is added before the ReLU.
    """

    net: str
    channels: int
    size: int
    out_channels: int
    window: ConvShape
    has_residual: bool

    @property
    def operation(self) -> str:
        return "conv_bn_add_relu" if self.has_residual else "conv_bn_relu"

    @property
    def id(self) -> str:
        w = self.window
        stride = "" if w.stride_h == 1 else f"s{w.stride_h}"
        return (
            f"{self.net}.conv{w.kernel_h}x{w.kernel_w}{stride}"
            f"-{self.channels}-{self.out_channels}-{self.size}"
        )

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.size, self.size

    def output_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.out_channels, *self.window.output_size(self.size, self.size)


@cache
def conv_sites(net: str) -> tuple[ConvSite, ...]:
    """Lists the convolutions of a net that our convolution kernel supports, without duplicates."""
    with torch.device("meta"):
        model = models.create_model(net, fused=False)
    # `conv_calls` lists each convolution with and without a residual. In a net, only the last
    # convolution of a block has a residual. It is 3×3 in ResNet-18 and 1×1 in ResNet-50.
    taps = 9 if net == "resnet18" else 1
    found: dict[ConvSite, None] = {}
    for call in conv_calls(model, IMAGE, torch.bfloat16):
        widens = call.out_channels >= call.channels and call.shape.stride_h == 1
        if not call.has_residual or (widens and call.shape.taps == taps):
            site = ConvSite(
                net, call.channels, call.height, call.out_channels, call.shape, call.has_residual
            )
            found[site] = None
    return tuple(found)
