"""Batches of a data set that lives on the device as uint8: shuffled and augmented there."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bnres.augment import Compose
from bnres.data.dataset import ImageDataset
from bnres.data.seeds import generator_at


def check_batch_size(batch_size: int, images: int, name: str) -> None:
    """Raises ValueError for a batch that batch norm or the data set is too small for."""
    if not 2 <= batch_size <= images:
        raise ValueError(
            f"batch_size must be from 2 to {images} (the training images of {name}), got "
            f"{batch_size}"
        )


def batch_count(images: int, batch_size: int, drop_last: bool) -> int:
    """Batches of an epoch."""
    rest = images % batch_size
    return images // batch_size + int(not drop_last and rest > 1)


def take_shard(t: Tensor, shard: tuple[int, int]) -> Tensor:
    """Every so manyth row."""
    return t[shard[0] :: shard[1]]


def check_shard(batch_size: int, drop_last: bool, shard: tuple[int, int]) -> None:
    """Raises ValueError for batches that several processes can't have equal parts of."""
    parts = shard[1]
    if parts > 1 and (batch_size % parts or batch_size < 2 * parts or not drop_last):
        raise ValueError(
            f"batch_size must be a multiple of the {parts} processes, two images each at least, and "
            f"drop_last be set, got {batch_size} and {drop_last}"
        )


class Batches:
    """A data set on a device, handed out as float batches.

    Args:
        dataset: the images.
        device: where they live.
        batch_size: images a batch.
        train_augment: what becomes of training images.
        test_augment: what becomes of held-out images.
        seed: of order and augmentation.
        drop_last: leave out a training epoch's last, smaller batch; one of a single image, which
            batch norm does not take, is left out in any case.
        shard: which of how many equal parts of each batch, and of the held-out images, is handed
            out here.
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
        check_batch_size(batch_size, len(dataset.train_labels), dataset.name)
        check_shard(batch_size, drop_last, shard)
        self.train_images = dataset.train_images.to(device)
        self.train_labels = dataset.train_labels.to(device)
        self.test_images = dataset.test_images.to(device)
        self.test_labels = dataset.test_labels.to(device)
        self.batch_size, self.seed, self.drop_last, self.shard = batch_size, seed, drop_last, shard
        self.train_augment, self.test_augment = train_augment, test_augment

    def __len__(self) -> int:
        """Batches of a training epoch."""
        return batch_count(self.train_count, self.batch_size, self.drop_last)

    @property
    def images_per_epoch(self) -> int:
        """Images of these batches."""
        return min(len(self) * self.batch_size, self.train_count)

    @property
    def train_count(self) -> int:
        """Training images."""
        return len(self.train_labels)

    @property
    def test_count(self) -> int:
        """Held-out images."""
        return len(self.test_labels)

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from batch ``first`` on, the same whenever they are asked for."""
        generator = generator_at(self.seed, "order", epoch)
        order = torch.randperm(self.train_count, generator=generator).to(self.train_images.device)
        for step in range(first, len(self)):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            index = take_shard(index, self.shard)
            generator = generator_at(self.seed, "augment", epoch, step, self.shard[0])
            yield self.train_augment(self.train_images[index], generator), self.train_labels[index]

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out images of this shard, in order."""
        pairs = zip(
            take_shard(self.test_images, self.shard).split(self.batch_size),
            take_shard(self.test_labels, self.shard).split(self.batch_size),
            strict=True,
        )
        for images, labels in pairs:
            yield self.test_augment(images), labels
