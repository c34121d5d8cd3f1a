"""What a fused chain of augmentations does to all images, and the parameters drawn for each."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# The numbers of the colour operations. A number is the operation's index in `AugmentDraws.factors`,
# and `AugmentDraws.order` lists the numbers.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3
# A packed order is one integer with ORDER_BITS bits for each number. The lowest bits hold the
# operation that is applied first.
ORDER_BITS = 4
NO_OPERATION = 15


@dataclass(frozen=True)
class AugmentPlan:
    """The properties of a chain that are the same for all images.

    Attributes:
        height, width: size of the output.
        resizes: whether boxes are resized to the size of the output.
        has_color: whether there are colour operations.
        has_contrast: whether one of them is contrast, which needs each image's mean gray.
        color_first: whether colour operations are applied to the whole image, before the crop.
        mean, std: mean and std of each channel for the normalisation at the end, or None.
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
        geometry: int32 (N, 6): top, left, height and width of the box that is cropped from the
            source; then 0 or 1 for a vertical flip and for a horizontal flip. The box may extend
            beyond the image; its positions outside the image are 0.
        order: int32 (N, 2): the packed order of the colour operations, and the position of contrast
            in it, or 4 without contrast.
        factors: fp32 (N, 4): the factors of brightness, contrast and saturation, and the turn of
            the hue.
    """

    geometry: Tensor
    order: Tensor
    factors: Tensor
