"""Transforms of torchvision for batches. Each image has its own random parameters.

A transform only draws its parameters. `bnres.augment.segments` then applies the parameters of a
whole chain. Parameters are drawn on the CPU, so that they do not depend on the images' device.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from bnres.augment.draws import Color, Crop, Draw, Flip, Scale
from bnres.augment.segments import apply_draws, size_of
from bnres.kernels.augment_plan import BRIGHTNESS, CONTRAST, HUE, NO_OPERATION, SATURATION

TRIES = 10


class Transform(ABC):
    """A step of a chain of transforms. It can also be called by itself.

    ``transform(images, generator)`` is the same as ``Compose([transform])(images, generator)``. See
    `bnres.augment.Compose`.
    """

    @abstractmethod
    def draw(self, count: int, height: int, width: int, generator: torch.Generator | None) -> Draw:
        """Draws the parameters of this step for ``count`` images of the given size."""

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return apply_draws(images, [self.draw(*size_of(images), generator)])

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"


def _uniform(
    shape: tuple[int, ...], low: float, high: float, generator: torch.Generator | None
) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _integers(limits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws a uniform integer from 0 to limit - 1 for each element of ``limits``."""
    return (_uniform(tuple(limits.shape), 0, 1, generator) * limits).long()


def _size_pair(size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= 1 for v in pair):
        raise ValueError(f"size must be one or two integers of at least 1, got {size!r}")
    return pair[0], pair[1]


def _range(name: str, value: Sequence[float]) -> tuple[float, float]:
    pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
        raise ValueError(f"{name} must be two numbers above 0 in ascending order, got {value!r}")
    return float(pair[0]), float(pair[1])


class _RandomFlip(Transform):
    vertical: bool

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must be from 0 to 1, got {p!r}")
        self.p = p

    def draw(self, count: int, height: int, width: int, generator: torch.Generator | None) -> Flip:
        return Flip(_uniform((count,), 0, 1, generator) < self.p, self.vertical)


class RandomHorizontalFlip(_RandomFlip):
    """Exchanges an image's left and right with probability ``p``, as in torchvision."""

    vertical = False


class RandomVerticalFlip(_RandomFlip):
    """Exchanges an image's top and bottom with probability ``p``, as in torchvision."""

    vertical = True


class RandomResizedCrop(Transform):
    """Crops a box of random area and shape, and resizes the box to ``size``.

    The resize is bilinear and antialiased. As in `torchvision.transforms.v2.RandomResizedCrop`, ten
    random boxes are drawn, and the first that fits into the image is used. If none of them fits,
    the largest central box with a permitted ratio is used.

    Args:
        size: size of the output, as one integer or as (height, width).
        scale: (least, greatest) area of the box, divided by the image's area.
        ratio: (least, greatest) ratio of the box's width to its height.

    Raises:
        ValueError: if ``size`` is below 1, or ``scale`` or ``ratio`` is not two numbers above 0 in
            ascending order.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
    ) -> None:
        self.size = _size_pair(size)
        self.scale, self.ratio = _range("scale", scale), _range("ratio", ratio)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator | None) -> Crop:
        shape = (count, TRIES)
        area = height * width * _uniform(shape, *self.scale, generator)
        ratio = _uniform(shape, log(self.ratio[0]), log(self.ratio[1]), generator).exp()
        # torchvision uses Python's round, which rounds halves to even, as torch.round does.
        w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        valid = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = valid.int().argmax(1, keepdim=True)
        h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
        found = valid.any(1)
        central_h, central_w = self._central(height, width)
        h, w = torch.where(found, h, central_h), torch.where(found, w, central_w)
        top, left = _integers(height - h + 1, generator), _integers(width - w + 1, generator)
        top = torch.where(found, top, (height - central_h) // 2)
        left = torch.where(found, left, (width - central_w) // 2)
        return Crop(torch.stack((top, left, h, w), 1), self.size, True)

    def _central(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width of the largest box whose ratio is permitted."""
        low, high = self.ratio
        if width / height < low:
            return max(round(width / low), 1), width
        if width / height > high:
            return height, max(round(height * high), 1)
        return height, width


class RandomCrop(Transform):
    """Pads images with zeros, then crops a box of ``size`` at a random position.

    The positions are distributed as in `torchvision.transforms.v2.RandomCrop`.

    Args:
        size: size of the output, as one integer or as (height, width).
        padding: number of zeros on each side: one integer for all sides, a pair (the first for
            left and right, the second for top and bottom), or (left, top, right, bottom).

    Raises:
        ValueError: if ``size`` is below 1 or ``padding`` below 0. A call also raises it if the
            padded images are smaller than ``size``.
    """

    def __init__(
        self, size: int | Sequence[int], padding: int | Sequence[int] | None = None
    ) -> None:
        self.size = _size_pair(size)
        sides = (padding or 0,) if isinstance(padding, int | None) else tuple(padding)
        if len(sides) not in (1, 2, 4) or not all(isinstance(v, int) and v >= 0 for v in sides):
            raise ValueError(f"padding must be 1, 2 or 4 integers of at least 0, got {padding!r}")
        self.padding = (sides * 4)[:4]

    def draw(self, count: int, height: int, width: int, generator: torch.Generator | None) -> Crop:
        left, top, right, bottom = self.padding
        spare_h = height + top + bottom - self.size[0]
        spare_w = width + left + right - self.size[1]
        if spare_h < 0 or spare_w < 0:
            raise ValueError(
                f"size must be at most the size of the padded images, got {self.size} for images "
                f"of {(height, width)} with padding {self.padding}"
            )
        limits = torch.tensor([spare_h + 1, spare_w + 1]).expand(count, 2)
        offsets = _integers(limits, generator) - torch.tensor([top, left])
        boxes = torch.cat((offsets, torch.tensor(self.size).expand(count, 2)), 1)
        return Crop(boxes, self.size, False)


class CenterCrop(Transform):
    """Crops a box of ``size`` from the centre of an image.

    Unlike `torchvision.transforms.v2.CenterCrop`, it does not pad images that are smaller than
    ``size``.

    Args:
        size: size of the output, as one integer or as (height, width).

    Raises:
        ValueError: if ``size`` is below 1. A call also raises it if the images are smaller than
            ``size``.
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = _size_pair(size)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator | None) -> Crop:
        if self.size[0] > height or self.size[1] > width:
            raise ValueError(
                f"size must be at most the images' size {(height, width)}, got {self.size}"
            )
        # As in torchvision, round() rounds halves to even.
        top, left = round((height - self.size[0]) / 2), round((width - self.size[1]) / 2)
        return Crop(torch.tensor([top, left, *self.size]).expand(count, 4), self.size, False)


Amount = float | Sequence[float] | None


class ColorJitter(Transform):
    """Changes brightness, contrast, saturation and hue by random factors, in a random order.

    `torchvision.transforms.v2.ColorJitter` does the same on float images. Saturation and hue do not
    change images of one channel.

    Args:
        brightness, contrast, saturation: (least, greatest) factor, or a number v, which means
            (max(0, 1 - v), 1 + v). By default nothing changes.
        hue: (least, greatest) shift of the hue, or a number v, which means (-v, v). A shift is from
            -0.5 to 0.5, where 1 is a full turn. By default nothing changes.

    Raises:
        ValueError: if v is negative, or if a range is out of bounds or not ascending. A call also
            raises it if the images have neither 1 nor 3 channels.
    """

    def __init__(
        self,
        brightness: Amount = None,
        contrast: Amount = None,
        saturation: Amount = None,
        hue: Amount = None,
    ) -> None:
        limit = (0.0, float("inf"))
        self.brightness = _jitter_range("brightness", brightness, 1.0, limit)
        self.contrast = _jitter_range("contrast", contrast, 1.0, limit)
        self.saturation = _jitter_range("saturation", saturation, 1.0, limit)
        self.hue = _jitter_range("hue", hue, 0.0, (-0.5, 0.5))

    def draw(self, count: int, height: int, width: int, generator: torch.Generator | None) -> Color:
        order = torch.rand((count, 4), generator=generator).argsort(1)
        factors = torch.zeros((count, 4), dtype=torch.float64)
        for number, limits in (
            (BRIGHTNESS, self.brightness),
            (CONTRAST, self.contrast),
            (SATURATION, self.saturation),
            (HUE, self.hue),
        ):
            if limits is None:
                order = torch.where(order == number, NO_OPERATION, order)
            else:
                factors[:, number] = _uniform((count,), *limits, generator)
        return Color(order, factors)


def _jitter_range(
    name: str, value: Amount, centre: float, bound: tuple[float, float]
) -> tuple[float, float] | None:
    if value is None:
        return None
    if isinstance(value, int | float):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value!r}")
        low, high = centre - value, centre + value
        low = max(low, 0.0) if centre else low
    elif len(value) == 2:
        low, high = float(value[0]), float(value[1])
    else:
        raise ValueError(f"{name} must be one or two numbers, got {value!r}")
    if not bound[0] <= low <= high <= bound[1]:
        raise ValueError(f"{name} must be within {bound} and in ascending order, got {value!r}")
    return None if low == high == centre else (low, high)


class Normalize(Transform):
    """Computes (x − mean)/std for each channel, as torchvision's transform of this name does.

    Args:
        mean: mean of each channel, for pixel values from 0 to 1.
        std: standard deviation of each channel.

    Raises:
        ValueError: if a std is 0, or if ``mean`` and ``std`` are empty or differ in length. A call
            also raises it if the images don't have one channel for each mean.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"mean and std must have the same length of at least 1, got {mean!r} and {std!r}"
            )
        if 0.0 in self.std:
            raise ValueError(f"std must not contain 0, got {std!r}")

    def draw(self, count: int, height: int, width: int, generator: torch.Generator | None) -> Scale:
        return Scale(self.mean, self.std)
