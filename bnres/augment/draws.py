"""The parameters that transforms draw for the images of a batch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Flip:
    """Flips some images.

    Attributes:
        chosen: bool (N,). It says whether each image is flipped.
        vertical: whether to flip along the height instead of the width.
    """

    chosen: Tensor
    vertical: bool


@dataclass(frozen=True)
class Crop:
    """Crops each image.

    Attributes:
        boxes: int64 (N, 4). A row has the top, left, height and width of an image's box. A box may
            extend beyond the image. Pixels outside the image are zero.
        size: height and width of the output.
        resizes: whether boxes are resized to ``size``. If it is False, all boxes have this size.
    """

    boxes: Tensor
    size: tuple[int, int]
    resizes: bool


@dataclass(frozen=True)
class Color:
    """Changes colours by four operations. `bnres.kernels.augment_plan` defines their numbers.

    Attributes:
        numbers: int64 (N, 4). A row has the numbers of the operations for an image, in the order in
            which they are applied. NO_OPERATION replaces an operation that is left out.
        factors: fp64 (N, 4). A row has the factors of the operations for an image. The column is
            the operation's number.
    """

    numbers: Tensor
    factors: Tensor


@dataclass(frozen=True)
class Scale:
    """Computes (x − mean)/std, where each channel has its mean and its std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


Draw = Flip | Crop | Color | Scale
