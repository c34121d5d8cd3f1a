"""The parameters that transforms draw for the images of a batch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Flip:
    """Flips some images.

    Attributes:
        chosen: bool (N,): whether to flip each image.
        vertical: whether to flip along the height instead of the width.
    """

    chosen: Tensor
    vertical: bool


@dataclass(frozen=True)
class Crop:
    """Crops each image.

    Attributes:
        boxes: int64 (N, 4): top, left, height and width. A box may extend beyond the image, where
            pixels are zero.
        size: height and width of the output.
        resizes: whether boxes are resized to ``size``. If False, all boxes have this size.
    """

    boxes: Tensor
    size: tuple[int, int]
    resizes: bool


@dataclass(frozen=True)
class Color:
    """Changes colours by four operations, numbered as in `bnres.kernels.augment_plan`.

    Attributes:
        numbers: int64 (N, 4): for each image, the numbers of the operations in the order in which
            they are applied. NO_OPERATION replaces an operation that is left out.
        factors: fp64 (N, 4): for each image, the factor of each operation. The column is the
            operation's number.
    """

    numbers: Tensor
    factors: Tensor


@dataclass(frozen=True)
class Scale:
    """Computes (x − mean)/std with a mean and std for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


Draw = Flip | Crop | Color | Scale
