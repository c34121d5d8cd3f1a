"""Loads images from one folder per class: ``root/train/CLASS/*`` and ``root/val/CLASS/*``."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bnres.data.images import read_rgb

# The suffixes that torchvision's ImageFolder accepts.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# The mean and standard deviation of ImageNet's channels, for pixel values from 0 to 1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN, TEST = "train", ("val", "test")


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files. An item is an image, decoded to uint8 (3, size, size), and its label.

    An image's shorter side is resized to ``size``, then its centre is cropped. As in torchvision's
    loader, EXIF orientation is not applied. An item raises `CorruptImage` if its file can't be
    read as an image.
    """

    def __init__(self, files: list[tuple[Path, int]], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import numpy as np
        from PIL import Image, ImageOps

        path, label = self.files[index]
        size = (self.size, self.size)
        picture = ImageOps.fit(read_rgb(path, size), size, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1), label


@dataclass(frozen=True)
class FolderDataset:
    """A data set of image files, which are decoded when they are needed.

    Attributes:
        name: name of the data set.
        class_names: names of the classes. Label i means ``class_names[i]``.
        train, test: the training images, and the held-out images.
        mean, std: mean and standard deviation of each channel, by default ImageNet's.
        channels: number of channels.
    """

    name: str
    class_names: tuple[str, ...]
    train: ImageFiles
    test: ImageFiles
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    channels = 3

    @property
    def train_count(self) -> int:
        return len(self.train)

    @property
    def test_count(self) -> int:
        return len(self.test)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.train.size, self.train.size


def load_folder(root: Path, size: int = 256) -> FolderDataset:
    """Returns a data set of the images in ``root/train`` (training) and ``root/val`` (held out).

    If there is no ``root/val``, the held-out images are in ``root/test``.

    Args:
        root: the folder.
        size: height and width of the decoded images.

    Raises:
        ValueError: if a folder is missing, a class has no images, or the two folders have different
            classes. The error names the folder.
    """
    root = Path(root)
    test = next((root / name for name in TEST if (root / name).is_dir()), None)
    if not (root / TRAIN).is_dir() or test is None:
        raise ValueError(
            f"data: {root} must hold a folder {TRAIN}, and a folder {' or '.join(TEST)}"
        )
    names = _class_names(root / TRAIN)
    if _class_names(test) != names:
        differing = sorted(set(names) ^ set(_class_names(test)))
        raise ValueError(
            f"data: {root / TRAIN} and {test} must have the same classes, but only one has "
            f"{', '.join(differing[:5])}"
        )
    return FolderDataset(
        root.name,
        names,
        ImageFiles(_files(root / TRAIN, names), size),
        ImageFiles(_files(test, names), size),
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))
    if not names:
        raise ValueError(f"data: {folder} must hold a folder for each class, but holds no folder")
    return names


def _files(folder: Path, names: tuple[str, ...]) -> list[tuple[Path, int]]:
    found = []
    for label, name in enumerate(names):
        paths = _images(folder / name)
        if not paths:
            raise ValueError(f"data: {folder / name} holds no image ({', '.join(SUFFIXES)})")
        found += [(path, label) for path in paths]
    return found


def _images(top: Path) -> list[Path]:
    """Lists the images in a folder and in all folders below it, in torchvision's order.

    Links to folders are followed, as in torchvision. But a link to a folder that contains the link
    is not followed, because the list would never end.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"data: {error.filename} can't be listed: {error.strerror}") from error

    found = []
    # For each folder that is not visited yet: the real paths of the folders above it.
    above: dict[str, frozenset[str]] = {str(top): frozenset()}
    for folder, folders, names in os.walk(str(top), onerror=refuse, followlinks=True):
        real = above.pop(folder) | {os.path.realpath(folder)}
        below = {name: os.path.join(folder, name) for name in folders}
        folders[:] = [name for name in folders if os.path.realpath(below[name]) not in real]
        above |= {below[name]: real for name in folders}
        found += [(folder, name) for name in names if name.lower().endswith(SUFFIXES)]
    return [Path(folder, name) for folder, name in sorted(found)]
