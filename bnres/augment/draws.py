"""What transforms draw for the images of a batch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Flip:
    """Which images (N,) are flipped, along the height or the width."""

    chosen: Tensor
    vertical: bool


@dataclass(frozen=True)
class Crop:
    """Boxes int64 (N, 4) of top, left, height and width, over the rim too, and what they become."""

    boxes: Tensor
    size: tuple[int, int]
    resizes: bool


@dataclass(frozen=True)
class Color:
    """Operations' numbers (N, 4) in each image's order, and its factors (N, 4) by number."""

    numbers: Tensor
    factors: Tensor


@dataclass(frozen=True)
class Scale:
    """(x − mean)/std for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


Draw = Flip | Crop | Color | Scale
