"""Makes random images in the shape of a data set, for measuring speed."""

import torch

from bnres.data.dataset import ImageDataset, make_dataset

TRAIN, TEST = 2048, 256
SEED = 0


def load_synthetic(classes: int, size: int, channels: int = 3) -> ImageDataset:
    """Returns random images and labels, the same in every run.

    Args:
        classes: number of classes.
        size: height and width of the images.
        channels: number of channels.
    """
    generator = torch.Generator().manual_seed(SEED)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (count, channels, size, size)
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return images, torch.randint(classes, (count,), generator=generator)

    names = tuple(map(str, range(classes)))
    return make_dataset(f"synthetic {size}×{size}", names, draw(TRAIN), draw(TEST))
