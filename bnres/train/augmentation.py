"""Builds the augmentation of a run's images."""

from functools import partial

import torch

from bnres.augment import (
    CenterCrop,
    ColorJitter,
    Compose,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Transform,
)
from bnres.data import FolderDataset, ImageDataset
from bnres.train.config import DTYPES, TrainConfig


def chains(config: TrainConfig, dataset: ImageDataset | FolderDataset) -> tuple[Compose, Compose]:
    """Returns two augmentations: one for training images and one for held-out images.

    With mixed precision, both augmentations return images in the run's 16-bit dtype, so that
    autocast does not have to convert the images.

    Raises:
        ValueError: if ``config.crop_size`` is greater than the images' height or width.
    """
    crop: list[Transform] = []
    middle: list[Transform] = []
    if config.crop_size is not None:
        if config.crop_size > min(dataset.size):
            raise ValueError(
                f"crop_size must be at most {min(dataset.size)}, the shorter side of the images of "
                f"{dataset.name}, got {config.crop_size}"
            )
        crop = [RandomResizedCrop(config.crop_size, scale=(config.crop_scale, 1.0))]
        middle = [CenterCrop(config.crop_size)]
    elif config.shift:
        crop = [RandomCrop(dataset.size, padding=config.shift)]
    amounts = (config.brightness, config.contrast, config.saturation, config.hue)
    jitter: list[Transform] = [ColorJitter(*amounts)] if any(amounts) else []
    flip: list[Transform] = [RandomHorizontalFlip()] if config.flip else []
    scale: list[Transform] = [Normalize(dataset.mean, dataset.std)] if config.normalize else []
    order = [*jitter, *crop] if config.color_first else [*crop, *jitter]
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    compose = partial(Compose, dtype=DTYPES[config.dtype], memory_format=memory_format)
    return compose([*flip, *order, *scale]), compose([*middle, *scale])
