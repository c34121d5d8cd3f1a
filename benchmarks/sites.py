"""The batch-norm sites of ResNet-18 and what stands around each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One kind of batch norm of ResNet-18 at 224×224.

    Attributes:
        name: stage of the net.
        operation: ``bn``, ``bn_relu`` or ``bn_add_relu``.
        channels: channels.
        size: height and width.
        count: how many of them there are.
    """

    name: str
    operation: str
    channels: int
    size: int
    count: int

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
