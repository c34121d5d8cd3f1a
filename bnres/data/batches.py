"""Batches of a data set that lives on the device as uint8: shuffled, shifted, normalised there."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.data.dataset import ImageDataset


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W) moved by up to ``pixels`` in both directions, zeros moving in.

    The offsets come from ``generator``, a CPU one, so that every device draws the same.
    """
    n, _, height, width = images.shape
    span = 2 * pixels + 1
    offsets = torch.randint(span, (2, n), generator=generator).to(images.device)
    padded = F.pad(images, [pixels] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n, device=images.device), :, offsets[0], offsets[1]]


class Batches:
    """A data set on a device, handed out as float batches.

    Args:
        dataset: the images.
        device: where they live.
        batch_size: images a batch; the last, smaller one of a training epoch is left out.
        shift: greatest shift of a training image, in pixels.
        memory_format: layout of the batches.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        device: torch.device,
        batch_size: int,
        shift: int,
        memory_format: torch.memory_format,
    ) -> None:
        if not 2 <= batch_size <= len(dataset.train_labels):
            raise ValueError(
                f"batch_size must be from 2 to {len(dataset.train_labels)} (the training images "
                f"of {dataset.name}), got {batch_size}"
            )
        self.mean, self.std = dataset.mean, dataset.std
        self.train_images = dataset.train_images.to(device)
        self.train_labels = dataset.train_labels.to(device)
        self.test_images = dataset.test_images.to(device)
        self.test_labels = dataset.test_labels.to(device)
        self.batch_size, self.shift, self.memory_format = batch_size, shift, memory_format

    def __len__(self) -> int:
        """Batches of a training epoch."""
        return len(self.train_labels) // self.batch_size

    def train(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in an order, and with shifts, drawn from ``generator`` (on the CPU)."""
        order = torch.randperm(len(self.train_labels), generator=generator)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size].to(self.train_images.device)
            images = random_shift(self.train_images[index], self.shift, generator)
            yield self._normalised(images), self.train_labels[index]

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out images, all of them, in order."""
        pairs = zip(
            self.test_images.split(self.batch_size),
            self.test_labels.split(self.batch_size),
            strict=True,
        )
        for images, labels in pairs:
            yield self._normalised(images), labels

    def _normalised(self, images: Tensor) -> Tensor:
        scaled = (images.float() / 255 - self.mean) / self.std
        return scaled.contiguous(memory_format=self.memory_format)
