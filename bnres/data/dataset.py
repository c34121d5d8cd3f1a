"""A small image data set that lives in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageDataset:
    """Images as uint8 (N, channels, height, width), labels as int64 (N,).

    Attributes:
        mean: of the training images, on a scale from 0 to 1.
        std: likewise.
    """

    name: str
    classes: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: float
    std: float

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]


def hold_out(labels: Tensor, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices held out, ``per_class`` of each class, by a fixed seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held: list[Tensor] = []
    kept: list[Tensor] = []
    for label in labels.unique():
        members = order[labels[order] == label]
        held.append(members[:per_class])
        kept.append(members[per_class:])
    return torch.cat(kept), torch.cat(held)
