"""What batches of any data set share: order, counts, shards, augmentation."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from bnres.augment import Compose
from bnres.data.seeds import generator_at


class EpochBatches(ABC):
    """Batches of an epoch; they depend only on seed, epoch and batch.

    Args:
        name: of the data set, for errors.
        train_count: training images.
        test_count: held-out images.
        batch_size: images a batch.
        train_augment: what becomes of training images.
        test_augment: what becomes of held-out images.
        seed: of order and augmentation.
        drop_last: leave out a training epoch's last, smaller batch; one of a single image, which
            batch norm does not take, is left out in any case.
        shard: which of how many equal parts of each batch, and of the held-out images, is handed
            out here.

    Raises:
        ValueError: for a batch that batch norm or the data set is too small for, or that several
            processes can't have equal parts of.
    """

    def __init__(
        self,
        name: str,
        train_count: int,
        test_count: int,
        batch_size: int,
        train_augment: Compose,
        test_augment: Compose,
        seed: int,
        drop_last: bool,
        shard: tuple[int, int],
    ) -> None:
        parts = shard[1]
        if not 2 <= batch_size <= train_count:
            raise ValueError(
                f"batch_size must be from 2 to {train_count} (the training images of {name}), got "
                f"{batch_size}"
            )
        if parts > 1 and (batch_size % parts or batch_size < 2 * parts or not drop_last):
            raise ValueError(
                f"batch_size must be a multiple of the {parts} processes, two images each at least, "
                f"and drop_last be set, got {batch_size} and {drop_last}"
            )
        self.train_count, self.test_count, self.batch_size = train_count, test_count, batch_size
        self.train_augment, self.test_augment = train_augment, test_augment
        self.seed, self.drop_last, self.shard = seed, drop_last, shard

    @abstractmethod
    def fetch(self, order: Tensor, rows: int, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels on the device, ``rows`` at a time, in this order.

        Args:
            order: indices of training images, or of held-out ones.
            rows: images a batch; the last has what is left.
            train: which of the two.
        """

    def __len__(self) -> int:
        """Batches of a training epoch."""
        rest = self.train_count % self.batch_size
        return self.train_count // self.batch_size + int(not self.drop_last and rest > 1)

    @property
    def images_per_epoch(self) -> int:
        """Images of these batches."""
        return min(len(self) * self.batch_size, self.train_count)

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from batch ``first`` on, the same whenever they are asked for."""
        generator = generator_at(self.seed, "order", epoch)
        order = torch.randperm(self.train_count, generator=generator)
        order = order[first * self.batch_size : self.images_per_epoch]
        for batch, (images, labels) in enumerate(self._fetch_shard(order, train=True), first):
            generator = generator_at(self.seed, "augment", epoch, batch, self.shard[0])
            yield self.train_augment(images, generator), labels

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out images of this shard, in order."""
        for images, labels in self._fetch_shard(torch.arange(self.test_count), train=False):
            yield self.test_augment(images), labels

    def _fetch_shard(self, order: Tensor, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Every so manyth image: a batch being a multiple of the shards, of each batch as many."""
        rank, parts = self.shard
        order = order[rank::parts]
        # No images are no batch: splitting nothing would make an empty one.
        return self.fetch(order, self.batch_size // parts, train) if len(order) else iter(())
