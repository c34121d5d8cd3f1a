"""The 1,797 handwritten digits that scikit-learn carries (8×8, 17 shades)."""

import torch

from bnres.data.dataset import ImageDataset, split_dataset
from bnres.data.mnist5k import DIGITS

HELD_OUT_PER_CLASS = 36
SHADES = 16


def load_digits() -> ImageDataset:
    """A fifth of each class held out, the same in every run.

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed (it comes with ``bnres[train]``).
    """
    from sklearn import datasets

    content = datasets.load_digits()
    images = torch.from_numpy(content.images)[:, None] * (255 / SHADES)
    images, labels = images.round().byte(), torch.from_numpy(content.target).long()
    return split_dataset("digits", DIGITS, images, labels, HELD_OUT_PER_CLASS)
