"""Loads image data sets, and makes batches of them on a device."""

from pathlib import Path

from bnres.data.batches import Batches
from bnres.data.cifar10 import load_cifar10
from bnres.data.dataset import ImageDataset, make_dataset
from bnres.data.epochs import EpochBatches
from bnres.data.folder import FolderDataset, load_folder
from bnres.data.images import CorruptImage
from bnres.data.packaged import load_digits, load_mnist5k, load_synthetic
from bnres.data.streamed import StreamedBatches

# The loaders of the data sets that need no files, by name.
PACKAGED = {
    "mnist5k": load_mnist5k,
    "digits": load_digits,
    "synthetic-cifar": lambda: load_synthetic(classes=10, size=32),
    "synthetic-imagenet": lambda: load_synthetic(classes=1000, size=256),
}
# The data sets that need files, and descriptions of these files.
ON_DISK = {
    "cifar10": "CIFAR-10's files (bnres train --download downloads them)",
    "folder": "a folder that holds train/CLASS and val/CLASS",
}
DATASETS = (*PACKAGED, *ON_DISK)


def load_dataset(
    name: str, data: Path | None = None, *, checksum: bool = True
) -> ImageDataset | FolderDataset:
    """Loads one of the data sets in `DATASETS`.

    Args:
        name: name of the data set.
        data: path of the files of ``cifar10`` or ``folder``, None for the other data sets.
        checksum: whether to compare CIFAR-10's files with their published checksums or sizes.

    Raises:
        ValueError: if the name is unknown, if ``data`` is missing, if ``data`` is given for a data
            set that does not need it, or if the files are not valid.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if name in PACKAGED:
        if data is not None:
            raise ValueError(f"data must be None for {name}, which needs no files, got {data}")
        return PACKAGED[name]()
    if data is None:
        raise ValueError(f"data must be the path of {ON_DISK[name]}, got None")
    return load_folder(data) if name == "folder" else load_cifar10(data, checksum=checksum)


__all__ = [
    "DATASETS",
    "Batches",
    "CorruptImage",
    "EpochBatches",
    "FolderDataset",
    "ImageDataset",
    "StreamedBatches",
    "load_cifar10",
    "load_dataset",
    "load_digits",
    "load_folder",
    "load_mnist5k",
    "load_synthetic",
    "make_dataset",
]
