"""Loads the 1,797 handwritten digits of scikit-learn (8×8, 17 gray levels)."""

import torch

from bnres.data.dataset import ImageDataset, split_dataset
from bnres.data.mnist5k import DIGITS

HELD_OUT_PER_CLASS = 36
SHADES = 16


def load_digits() -> ImageDataset:
    """Returns the digits. In every run the same 36 images of each class (a fifth) are held out.

    Raises:
        ModuleNotFoundError: if scikit-learn is missing. The extra ``bnres[train]`` installs it.
    """
    from sklearn import datasets

    content = datasets.load_digits()
    images = torch.from_numpy(content.images)[:, None] * (255 / SHADES)
    images, labels = images.round().byte(), torch.from_numpy(content.target).long()
    return split_dataset("digits", DIGITS, images, labels, HELD_OUT_PER_CLASS)
