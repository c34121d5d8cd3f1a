"""Batches of images that worker processes decode while the device trains."""

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bnres.data.epochs import EpochBatches
from bnres.data.folder import FolderDataset
from bnres.data.images import CorruptImage

PREFETCH = 4


def _leave_signals(worker: int) -> None:
    """Makes a worker ignore Ctrl-C, and makes SIGTERM end the worker.

    A terminal sends Ctrl-C to all processes, but only the main process should handle it. The main
    process stops its workers itself, if necessary by SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StreamedBatches(EpochBatches):
    """Batches of a `FolderDataset`, which worker processes decode in advance.

    Batches are copied to a GPU through pinned memory.

    Args:
        workers: number of processes that decode. If it is 0, the calling process decodes.
        arguments, options: arguments of `EpochBatches`.
    """

    dataset: FolderDataset

    def __init__(self, *arguments: Any, workers: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.workers = workers

    def fetch(self, order: Tensor, rows: int, train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self.dataset.train if train else self.dataset.test,
            batch_size=rows,
            sampler=order.tolist(),
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals,
            # Otherwise the loader would draw from torch's global generator, which dropout uses.
            generator=torch.Generator().manual_seed(self.seed),
        )
        try:
            for images, labels in loader:
                yield (
                    images.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                )
        except CorruptImage as error:
            # The DataLoader puts a worker's traceback before the message. The message is one line.
            line = str(error).strip().splitlines()[-1]
            name = f"{CorruptImage.__module__}.{CorruptImage.__name__}: "
            raise CorruptImage(line.removeprefix(name)) from error
