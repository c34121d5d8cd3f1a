"""Batches of images that workers decode while the device trains."""

import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bnres.augment import Compose
from bnres.data.batches import batch_count, check_batch_size, check_shard, take_shard
from bnres.data.folder import FolderDataset, ImageFiles
from bnres.data.seeds import generator_at

PREFETCH = 4


def _leave_signals(worker: int) -> None:
    """Ctrl-C goes to every process: the run ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StreamedBatches:
    """`bnres.data.Batches` of a `FolderDataset`, with pinned memory and batches ahead.

    Args:
        dataset: the images.
        device: where the batches go.
        batch_size: images a batch.
        train_augment: what becomes of training images, on the device.
        test_augment: what becomes of held-out images.
        seed: of order and augmentation.
        drop_last, shard: as `bnres.data.Batches` has them.
        workers: processes that decode; 0 decodes in this one.
    """

    def __init__(
        self,
        dataset: FolderDataset,
        device: torch.device,
        batch_size: int,
        train_augment: Compose,
        test_augment: Compose,
        seed: int,
        drop_last: bool = True,
        shard: tuple[int, int] = (0, 1),
        *,
        workers: int,
    ) -> None:
        check_batch_size(batch_size, len(dataset.train), dataset.name)
        check_shard(batch_size, drop_last, shard)
        self.dataset, self.device, self.batch_size = dataset, device, batch_size
        self.train_augment, self.test_augment = train_augment, test_augment
        self.seed, self.drop_last, self.workers = seed, drop_last, workers
        self.shard = shard

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
        return len(self.dataset.train)

    @property
    def test_count(self) -> int:
        """Held-out images."""
        return len(self.dataset.test)

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from batch ``first`` on, the same whenever they are asked for."""
        generator = generator_at(self.seed, "order", epoch)
        order = torch.randperm(self.train_count, generator=generator)
        order = order[first * self.batch_size : self.images_per_epoch]
        # Rows of a batch one behind the other: as its size is a multiple, so are its shards' rows.
        order = take_shard(order, self.shard)
        for step, (images, labels) in enumerate(self._load(self.dataset.train, order), first):
            generator = generator_at(self.seed, "augment", epoch, step, self.shard[0])
            yield self.train_augment(images, generator), labels

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out images of this shard, in order."""
        order = take_shard(torch.arange(self.test_count), self.shard)
        for images, labels in self._load(self.dataset.test, order):
            yield self.test_augment(images), labels

    def _load(self, files: ImageFiles, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            files,
            batch_size=self.batch_size // self.shard[1],
            sampler=order.tolist(),
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals,
            generator=torch.Generator().manual_seed(self.seed),  # or it would draw from torch's own
        )
        for images, labels in loader:
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
