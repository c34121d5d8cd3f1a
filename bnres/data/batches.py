"""Batches of a data set that is stored on the device as uint8 and is augmented there."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bnres.data.dataset import ImageDataset
from bnres.data.epochs import EpochBatches


class Batches(EpochBatches):
    """Float batches of an `ImageDataset`, which is copied to the device once.

    Args:
        dataset: the images.
        device: device on which images are stored, augmented and returned.
        arguments, options: the other arguments of `EpochBatches`.
    """

    def __init__(
        self, dataset: ImageDataset, device: torch.device, *arguments: Any, **options: Any
    ):
        super().__init__(dataset, device, *arguments, **options)
        self.stored = {
            True: (dataset.train_images.to(device), dataset.train_labels.to(device)),
            False: (dataset.test_images.to(device), dataset.test_labels.to(device)),
        }

    def fetch(self, order: Tensor, rows: int, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.stored[train]
        for index in order.to(self.device).split(rows):
            yield images[index], labels[index]
