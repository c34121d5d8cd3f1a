"""Applies a chain of transforms in as few kernels as possible.

A *draw* contains the parameters of one transform for all images of a batch. One kernel can apply
the draws of most chains. The draws of other chains are split into segments, one for each kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnres.augment.draws import Color, Crop, Draw, Flip, Scale
from bnres.backend import uses_kernels
from bnres.kernels.augment_plan import CONTRAST, ORDER_BITS, AugmentDraws, AugmentPlan
from bnres.kernels.augment_reference import augment_ref

CHANNELS = (1, 3)


@dataclass
class Segment:
    """The draws that one kernel applies.

    A kernel can apply any number of flips, and at most one `Crop`, one `Color` and one `Scale`.

    Attributes:
        geometry: the flips and the crop, in the order in which they are applied.
        crop: the crop, or None.
        color: the colour operations, or None.
        color_first: whether the colour operations come before the crop.
        scale: the normalisation, or None. It is applied last.
    """

    geometry: list[Flip | Crop] = field(default_factory=list)
    crop: Crop | None = None
    color: Color | None = None
    color_first: bool = False
    scale: Scale | None = None

    def takes(self, draw: Draw) -> bool:
        """Whether one kernel can apply the draws of this segment, followed by ``draw``."""
        if self.scale is not None:
            return False
        if isinstance(draw, Crop):
            return self.crop is None
        return not isinstance(draw, Color) or self.color is None

    def add(self, draw: Draw) -> None:
        """Appends a draw for which `takes` returns True."""
        if isinstance(draw, Flip | Crop):
            self.geometry.append(draw)
        if isinstance(draw, Crop):
            self.crop, self.color_first = draw, self.color is not None
        elif isinstance(draw, Color):
            self.color = draw
        elif isinstance(draw, Scale):
            self.scale = draw


def segments(draws: Sequence[Draw]) -> list[Segment]:
    """Splits a chain's draws into segments, each of which one kernel can apply."""
    found: list[Segment] = []
    for draw in draws:
        if not found or not found[-1].takes(draw):
            found.append(Segment())
        found[-1].add(draw)
    return found


def size_of(images: Tensor) -> tuple[int, int, int]:
    """Checks a batch of images, and returns their number, height and width."""
    if images.dim() != 4 or images.shape[1] not in CHANNELS:
        raise ValueError(
            f"images must be (N, C, H, W) with 1 or 3 channels, got {tuple(images.shape)}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    n, _, height, width = images.shape
    return n, height, width


def apply_draws(
    images: Tensor,
    draws: Sequence[Draw],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Applies the draws of a chain's steps, in order, to a batch of images. See `Compose`.

    Raises:
        ValueError: if ``images`` is not a batch of images, or if a normalisation and the images
            have different numbers of channels.
    """
    size_of(images)
    images = images.detach()
    memory_format = memory_format or _memory_format(images)
    parts = segments(draws) or [Segment()]
    for part in parts:
        of_part = dtype if part is parts[-1] else torch.float32
        plan, on_device = prepare_draws(images, part, of_part, memory_format)
        if uses_kernels(images):
            from bnres.kernels.augment import augment

            images = augment(images, on_device, plan)
        else:
            images = augment_ref(images, on_device, plan)
    return images


def _memory_format(images: Tensor) -> torch.memory_format:
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def prepare_draws(
    images: Tensor, part: Segment, dtype: torch.dtype, memory_format: torch.memory_format
) -> tuple[AugmentPlan, AugmentDraws]:
    """Returns the arguments of the kernel that applies a segment to ``images``.

    The kernel's output has the given dtype and memory format.
    """
    n, channels, height, width = images.shape
    if part.scale is not None and len(part.scale.mean) != channels:
        raise ValueError(
            f"images must have {len(part.scale.mean)} channels, as Normalize has, got {channels}"
        )
    geometry, size = geometry_of(part, n, height, width)
    order, factors = order_of(part, n)
    plan = AugmentPlan(
        *size,
        resizes=part.crop is not None and part.crop.resizes,
        has_color=part.color is not None,
        has_contrast=bool((order[:, 1] < 4).any()),
        color_first=part.color_first,
        mean=None if part.scale is None else part.scale.mean,
        std=None if part.scale is None else part.scale.std,
        dtype=dtype,
        memory_format=memory_format,
    )
    return plan, AugmentDraws(*(_to(t, images.device) for t in (geometry, order, factors)))


def _to(t: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return t.pin_memory().to(device, non_blocking=True)
    return t


def geometry_of(
    part: Segment, count: int, height: int, width: int
) -> tuple[Tensor, tuple[int, int]]:
    """Returns `AugmentDraws.geometry`, int32 (N, 6), and the height and width of the output.

    A row of the geometry is an image's box and flips.
    """
    flips = torch.zeros((count, 2), dtype=torch.bool)
    size = (height, width)
    boxes = torch.tensor([0, 0, height, width]).expand(count, 4)
    for draw in part.geometry:
        if isinstance(draw, Flip):
            flips[:, 0 if draw.vertical else 1] ^= draw.chosen
            continue
        size, boxes = draw.size, draw.boxes.clone()
        # The kernel crops before it flips. If the chain flips first, the box is mirrored instead.
        for axis, length in ((0, height), (1, width)):
            mirrored = length - boxes[:, 2 + axis] - boxes[:, axis]
            boxes[:, axis] = torch.where(flips[:, axis], mirrored, boxes[:, axis])
    return torch.cat((boxes, flips.long()), 1).int(), size


def order_of(part: Segment, count: int) -> tuple[Tensor, Tensor]:
    """Returns `AugmentDraws.order`, int32 (N, 2), and `AugmentDraws.factors`, fp32 (N, 4)."""
    if part.color is None:
        return torch.full((count, 2), 4, dtype=torch.int32), torch.zeros((count, 4))
    numbers = part.color.numbers
    shifts = torch.arange(4) * ORDER_BITS
    packed = (numbers << shifts).sum(1)
    is_contrast = numbers == CONTRAST
    place = torch.where(is_contrast.any(1), is_contrast.int().argmax(1), 4)
    return torch.stack((packed, place), 1).int(), part.color.factors.float()
