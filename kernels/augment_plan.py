"""What a fused chain of augmentations does to every image, and the numbers drawn for each one."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# The colour operations' numbers: places of their factors, and of themselves in an image's order.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3
# In a packed order a number has so many bits, the first operation the lowest.
ORDER_BITS = 4
NO_OPERATION = 15


@dataclass(frozen=True)
class AugmentPlan:
    """The part of a chain that all images share: a crop and its resize, flips, colours, normalise.

    Attributes:
        height, width: of the output.
        resizes: whether boxes have another size than the output.
        has_color: whether there are colour operations.
        has_contrast: whether contrast, which needs each image's mean gray, is one of them.
        color_first: colours before the crop, on the whole image.
        mean, std: by which each channel is normalised at the end, or None.
        dtype: of the output.
        memory_format: of the output.
    """

    height: int
    width: int
    resizes: bool
    has_color: bool
    has_contrast: bool
    color_first: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    dtype: torch.dtype
    memory_format: torch.memory_format


class AugmentDraws(NamedTuple):
    """What was drawn for each image, on the images' device.

    Attributes:
        geometry: int32 (N, 6): top, left, height and width of the box in the source, which may lie
            over the rim, where zeros are read; whether to flip vertically, horizontally, after it.
        order: int32 (N, 2): the colour operations' packed order, and the place of contrast in it
            (4: none).
        factors: fp32 (N, 4): brightness, contrast, saturation, hue.
    """

    geometry: Tensor
    order: Tensor
    factors: Tensor
