"""The parameters that transforms draw for the images of a batch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Flip:
    """Flips some images.

    Attributes:
        chosen: bool (N,): whether an image is flipped.
        vertical: whether top and bottom are exchanged, instead of left and right.
    """

    chosen: Tensor
    vertical: bool


@dataclass(frozen=True)
class Crop:
    """Crops each image.

    Attributes:
        boxes: int64 (N, 4): the top, left, height and width of each image's box. A box may extend
            beyond its image. Pixels outside the image are zero.
        size: height and width of the output.
        resizes: whether boxes are resized to ``size``. If False, all boxes already have this size.
    """

    boxes: Tensor
    size: tuple[int, int]
    resizes: bool


@dataclass(frozen=True)
class Color:
    """Changes the brightness, contrast, saturation and hue of each image.

    Each of these four operations has a number, which `bnres.kernels.augment_plan` defines.

    Attributes:
        numbers: int64 (N, 4): for each image, the numbers of the operations in the order in which
            they are applied. NO_OPERATION stands for an operation that is left out.
        factors: fp64 (N, 4): ``factors[i, k]`` is the factor of operation k for image i. For the
            hue it is a shift, where 1 is a full turn of the colour circle.
    """

    numbers: Tensor
    factors: Tensor


@dataclass(frozen=True)
class Scale:
    """Computes (x − mean)/std, with one mean and one std for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


Draw = Flip | Crop | Color | Scale
