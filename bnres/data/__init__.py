"""Data sets."""

from collections.abc import Callable

from bnres.data.batches import Batches
from bnres.data.dataset import ImageDataset
from bnres.data.mnist5k import load_mnist5k

DATASETS: dict[str, Callable[[], ImageDataset]] = {"mnist5k": load_mnist5k}


def load_dataset(name: str) -> ImageDataset:
    """Loads a data set of `DATASETS`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name]()


__all__ = ["DATASETS", "Batches", "ImageDataset", "load_dataset", "load_mnist5k"]
