"""Batches of images that worker processes decode while the device trains."""

import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bnres.augment import Compose
from bnres.data.epochs import EpochBatches
from bnres.data.folder import FolderDataset
from bnres.data.images import CorruptImage

PREFETCH = 4


def _leave_signals(worker: int) -> None:
    """Makes a worker ignore Ctrl-C, which a terminal sends to all processes.

    The main process stops its workers itself. If a worker does not stop, the main process sends it
    SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StreamedBatches(EpochBatches):
    """Batches of a folder of images.

    Worker processes decode the images in advance. The batches are copied through pinned memory.

    Args:
        dataset: the images.
        device: device on which images are augmented and batches are returned.
        batch_size, train_augment, test_augment, seed, drop_last, shard: see `EpochBatches`.
        workers: number of processes that decode. If it is 0, the calling process decodes.
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
        super().__init__(
            dataset.name, len(dataset.train), len(dataset.test), batch_size, train_augment,
            test_augment, seed, drop_last, shard,
        )  # fmt: skip
        self.dataset, self.device, self.workers = dataset, device, workers

    def fetch(self, order: Tensor, rows: int, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self.dataset.train if train else self.dataset.test,
            batch_size=rows,
            sampler=order.tolist(),
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals,
            # Without this argument, the loader would draw from torch's global generator.
            generator=torch.Generator().manual_seed(self.seed),
        )
        try:
            for images, labels in loader:
                yield (
                    images.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                )
        except CorruptImage as error:
            # An error from a worker contains the worker's traceback, then the message.
            line = str(error).strip().splitlines()[-1]
            name = f"{CorruptImage.__module__}.{CorruptImage.__name__}: "
            raise CorruptImage(line.removeprefix(name)) from error
