"""An image data set that is stored in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageDataset:
    """An image data set in memory.

    Attributes:
        name: name of the data set.
        class_names: names of the classes. Label i means ``class_names[i]``.
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
    def train_count(self) -> int:
        return len(self.train_labels)

    @property
    def test_count(self) -> int:
        return len(self.test_labels)

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
    """Returns a data set of the given images, with the mean and std of the training images.

    Args:
        name: name of the data set.
        class_names: names of the classes. Label i means ``class_names[i]``.
        train, test: each a tuple (images, labels). The images are uint8 (N, channels, height,
            width), and the labels are int64 (N,).

    Raises:
        ValueError: if images or labels don't have the required dtype and shape, or a label has no
            class name.
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
    """Returns each channel's mean and standard deviation over uint8 images (N, C, H, W).

    The pixel values are first scaled to the range 0 to 1.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    # counts[c, v] is how often the value v occurs in channel c.
    counts = torch.stack([c.flatten().bincount(minlength=256) for c in images.unbind(1)]).double()
    n = counts.sum(1)
    mean = counts @ values / n
    squares = (values - mean[:, None]).square()
    std = ((counts * squares).sum(1) / (n - 1)).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
