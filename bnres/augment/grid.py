"""Draws a picture of an image's random transforms: eight results of each transform."""

import io
from pathlib import Path

import torch
from torch import Tensor

from bnres.augment.compose import Compose
from bnres.augment.transforms import (
    ColorJitter,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomVerticalFlip,
    Transform,
)
from bnres.files import write_bytes

ROWS, COLUMNS = 2, 4
# Side of the crop divided by the shorter side of the image. It is similar in the d2l.ai course,
# which crops photos with sides of 300 to 480 pixels to 200×200.
CROP_SHARE = 0.5
LARGEST_SIDE = 400
PICTURE_INCHES, TITLE_INCHES = 1.6, 0.35


def course_transforms(height: int, width: int) -> dict[str, Compose]:
    """Returns the transforms of the d2l.ai course, and a chain of three of them, by name.

    The crop depends on the image's height and width.
    """
    side = max(round(CROP_SHARE * min(height, width)), 1)
    crop = RandomResizedCrop(side, scale=(0.3, 0.8), ratio=(0.5, 2))
    jitter = ColorJitter(brightness=0.5, contrast=0.2, saturation=0.6, hue=0.4)
    chains: dict[str, list[Transform]] = {
        "RandomHorizontalFlip": [RandomHorizontalFlip()],
        "RandomVerticalFlip": [RandomVerticalFlip()],
        "RandomResizedCrop": [crop],
        "ColorJitter": [jitter],
        "all composed": [RandomHorizontalFlip(), crop, jitter],
    }
    return {name: Compose(chain) for name, chain in chains.items()}


def draw_grid(path: Path, image: Tensor, seed: int = 0) -> None:
    """Writes a PNG file with two rows of random results for each transform.

    ``image`` is uint8 (C, H, W).
    """
    from matplotlib.figure import Figure

    _, height, width = image.shape
    generator = torch.Generator().manual_seed(seed)
    batch = image.expand(ROWS * COLUMNS, -1, -1, -1).contiguous()
    drawn = {
        name: transform(batch, generator).permute(0, 2, 3, 1)
        for name, transform in course_transforms(height, width).items()
    }
    heights = [
        TITLE_INCHES + ROWS * PICTURE_INCHES * pictures.shape[1] / pictures.shape[2]
        for pictures in drawn.values()
    ]
    figure = Figure(figsize=(COLUMNS * PICTURE_INCHES, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(drawn), 1, height_ratios=heights, squeeze=False)
    for part, (name, pictures) in zip(parts[:, 0], drawn.items(), strict=True):
        part.suptitle(name, fontsize=11)
        for axes, picture in zip(part.subplots(ROWS, COLUMNS).flat, pictures, strict=True):
            axes.set_axis_off()
            axes.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getbuffer())
