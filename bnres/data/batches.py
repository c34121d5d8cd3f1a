"""Batches of a data set that is stored on the device as uint8 and is augmented there."""

from collections.abc import Iterator
from functools import cached_property

from torch import Tensor

from bnres.data.dataset import ImageDataset
from bnres.data.epochs import EpochBatches


class Batches(EpochBatches):
    """Float batches of an `ImageDataset`, which is copied to the device once."""

    dataset: ImageDataset

    @cached_property
    def stored(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The held-out images and labels, and the training images and labels, on the device."""
        data, device = self.dataset, self.device
        return (
            (data.test_images.to(device), data.test_labels.to(device)),
            (data.train_images.to(device), data.train_labels.to(device)),
        )

    def fetch(self, order: Tensor, rows: int, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.stored[train]
        for index in order.to(self.device).split(rows):
            yield images[index], labels[index]
