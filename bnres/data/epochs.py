"""Orders and augments images, divides them among processes, and puts them into batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from bnres.augment import Compose
from bnres.data.dataset import ImageDataset
from bnres.data.folder import FolderDataset
from bnres.data.seeds import generator_at


class EpochBatches(ABC):
    """Batches of a data set.

    In a given process, a batch depends only on the seed, the epoch and the number of the batch.

    Args:
        dataset: the images.
        device: device on which images are augmented and batches are returned.
        batch_size: number of images in a batch, for all processes together.
        train_augment: augmentation of training images.
        test_augment: augmentation of held-out images.
        seed: seed of the order and of the augmentation.
        drop_last: whether to leave out the last batch of a training epoch if it is smaller than the
            others. A last batch of one image is always left out, because batch norm does not accept
            it.
        shard: the number of this process, from 0, and the number of processes. Each process gets a
            part of each batch and a part of the held-out images.

    Raises:
        ValueError: if ``batch_size`` is below 2 or above the number of training images. With more
            than one process, also if ``batch_size`` can't be divided into equal parts of at least
            two images, or if ``drop_last`` is False.
    """

    def __init__(
        self,
        dataset: ImageDataset | FolderDataset,
        device: torch.device,
        batch_size: int,
        train_augment: Compose,
        test_augment: Compose,
        seed: int,
        drop_last: bool = True,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        parts = shard[1]
        if not 2 <= batch_size <= dataset.train_count:
            raise ValueError(
                f"batch_size must be from 2 to {dataset.train_count}, the number of training "
                f"images of {dataset.name}, got {batch_size}"
            )
        if parts > 1 and (batch_size % parts or batch_size < 2 * parts or not drop_last):
            raise ValueError(
                f"with {parts} processes batch_size must be a multiple of {parts} and at least "
                f"{2 * parts}, and drop_last must be True, got batch_size={batch_size}, "
                f"drop_last={drop_last}"
            )
        self.dataset: ImageDataset | FolderDataset = dataset
        self.device, self.batch_size = device, batch_size
        self.train_count, self.test_count = dataset.train_count, dataset.test_count
        self.train_augment, self.test_augment = train_augment, test_augment
        self.seed, self.drop_last, self.shard = seed, drop_last, shard

    @abstractmethod
    def fetch(self, order: Tensor, rows: int, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches of images and labels on the device, in the given order.

        Args:
            order: int64 indices of the images.
            rows: number of images in a batch. The last batch may be smaller.
            train: whether the images are training images. Otherwise they are held-out images.
        """

    def __len__(self) -> int:
        """The number of batches in a training epoch."""
        rest = self.train_count % self.batch_size
        return self.train_count // self.batch_size + int(not self.drop_last and rest > 1)

    @property
    def images_per_epoch(self) -> int:
        """The number of images in a training epoch."""
        return min(len(self) * self.batch_size, self.train_count)

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of an epoch, starting with batch ``first``.

        The batches of an epoch are the same in every call.
        """
        generator = generator_at(self.seed, "order", epoch)
        order = torch.randperm(self.train_count, generator=generator)
        order = order[first * self.batch_size : self.images_per_epoch]
        for batch, (images, labels) in enumerate(self._fetch_shard(order, train=True), first):
            generator = generator_at(self.seed, "augment", epoch, batch, self.shard[0])
            yield self.train_augment(images, generator), labels

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches of this process's held-out images, in order."""
        for images, labels in self._fetch_shard(torch.arange(self.test_count), train=False):
            yield self.test_augment(images), labels

    def _fetch_shard(self, order: Tensor, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches of this process's images.

        If there are n processes, process r gets the images order[r], order[r + n], and so on.
        """
        rank, parts = self.shard
        order = order[rank::parts]
        # Splitting an empty order would yield one empty batch.
        return self.fetch(order, self.batch_size // parts, train) if len(order) else iter(())
