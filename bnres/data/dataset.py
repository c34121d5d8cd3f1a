"""An image data set that is stored in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

# At most this many images are summed at once, which limits the memory for their fp64 copies.
CHUNK = 4096
SPLIT_SEED = 0


@dataclass(frozen=True)
class ImageDataset:
    """An image data set in memory.

    Attributes:
        name: name of the data set.
        class_names: names of the classes. Label i belongs to the i-th name.
        train_images, test_images: images, uint8 (N, channels, height, width).
        train_labels, test_labels: labels, int64 (N,).
        mean, std: mean and standard deviation of each channel of the training images, with pixel
            values scaled to the range 0 to 1.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.train_images.shape[2], self.train_images.shape[3]


def make_dataset(
    name: str,
    class_names: tuple[str, ...],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
) -> ImageDataset:
    """Returns a data set of the given images. Computes the mean and std of the training images.

    Args:
        name: name of the data set.
        class_names: names of the classes. Label i belongs to the i-th name.
        train, test: a tuple of images and labels. The images are uint8 (N, channels, height,
            width), and the labels are int64 (N,).

    Raises:
        ValueError: if images or labels have another dtype or shape, or a label has no class name.
    """
    for part, (images, labels) in (("train", train), ("test", test)):
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(
                f"{part}: images must be torch.uint8 of shape (N, channels, height, width), got "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{part}: labels must be torch.int64 of shape ({len(images)},), got "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
            raise ValueError(
                f"{part}: labels must be from 0 to {len(class_names) - 1}, because there are "
                f"{len(class_names)} classes, got {labels.min()} to {labels.max()}"
            )
    mean, std = channel_statistics(train[0])
    return ImageDataset(name, class_names, *train, *test, mean, std)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation of each channel of uint8 images scaled to 0 to 1."""
    channels = images.shape[1]
    total, squares = (torch.zeros(channels, dtype=torch.float64) for _ in range(2))
    for chunk in images.split(CHUNK):
        values = chunk.double()
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = images.numel() // channels
    mean = total / count
    std = ((squares / count - mean.square()) * count / (count - 1)).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def split_dataset(
    name: str, class_names: tuple[str, ...], images: Tensor, labels: Tensor, per_class: int
) -> ImageDataset:
    """Returns a data set that holds out ``per_class`` images of each class, always the same."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    members = [order[labels[order] == label] for label in labels.unique()]
    train = torch.cat([indices[per_class:] for indices in members])
    test = torch.cat([indices[:per_class] for indices in members])
    return make_dataset(
        name, class_names, (images[train], labels[train]), (images[test], labels[test])
    )
