"""Describes a fused chain of augmentations, and the parameters that are drawn for each image."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# The numbers of the colour operations. An operation's number is its column in
# `AugmentDraws.factors`, and stands for the operation in `AugmentDraws.order`.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3
# A packed order has the numbers of an image's colour operations in one integer, ORDER_BITS bits
# each. The first operation is in the lowest bits. NO_OPERATION stands for an operation that is left
# out.
ORDER_BITS = 4
NO_OPERATION = 15


@dataclass(frozen=True)
class AugmentPlan:
    """The properties of a chain that are the same for all images.

    Attributes:
        height, width: size of the output.
        resizes: whether the cropped boxes are resized to the size of the output.
        has_color: whether there are colour operations.
        has_contrast: whether contrast is one of the colour operations.
        color_first: whether colour operations are applied before the crop.
        mean, std: each channel's mean and std for the normalisation at the end. Both are None if
            the images are not normalised.
        dtype: dtype of the output.
        memory_format: memory format of the output.
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
    """The parameters drawn for each image, on the images' device.

    Attributes:
        geometry: int32 (N, 6). Columns 0 to 3 are top, left, height and width of the box that is
            cropped from the source. Column 4 is 1 for a vertical flip, otherwise 0. Column 5 is 1
            for a horizontal flip, otherwise 0. A box that is not resized may extend beyond the
            image, where all values are 0.
        order: int32 (N, 2). Column 0 is the packed order of the colour operations. Column 1 is the
            position of contrast in this order, or 4 if there is no contrast.
        factors: fp32 (N, 4): the factors of brightness, contrast and saturation, and the shift of
            the hue. A shift of 1 is a full turn of the colour circle.
    """

    geometry: Tensor
    order: Tensor
    factors: Tensor
