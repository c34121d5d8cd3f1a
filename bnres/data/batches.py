"""Batches of a data set that is stored on the device as uint8 and is augmented there."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bnres.augment import Compose
from bnres.data.dataset import ImageDataset
from bnres.data.epochs import EpochBatches


class Batches(EpochBatches):
    """Float batches of a data set that is copied to the device once.

    Args:
        dataset: the images.
        device: where the images are stored and augmented.
        batch_size, train_augment, test_augment, seed, drop_last, shard: see `EpochBatches`.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        device: torch.device,
        batch_size: int,
        train_augment: Compose,
        test_augment: Compose,
        seed: int,
        drop_last: bool = True,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(
            dataset.name, len(dataset.train_labels), len(dataset.test_labels), batch_size,
            train_augment, test_augment, seed, drop_last, shard,
        )  # fmt: skip
        self.device = device
        self.train_images = dataset.train_images.to(device)
        self.train_labels = dataset.train_labels.to(device)
        self.test_images = dataset.test_images.to(device)
        self.test_labels = dataset.test_labels.to(device)

    def fetch(self, order: Tensor, rows: int, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.test_images, self.test_labels
        if train:
            images, labels = self.train_images, self.train_labels
        for index in order.to(self.device).split(rows):
            yield images[index], labels[index]
