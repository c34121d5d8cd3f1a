"""Puts a chain of transforms into as few fused kernels as its order allows, nearly always one."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnres.augment.transforms import Color, Crop, Draw, Flip, Scale, Transform
from bnres.backend import uses_kernels
from bnres.kernels.augment_plan import CONTRAST, ORDER_BITS, AugmentDraws, AugmentPlan
from bnres.kernels.augment_reference import augment_ref

CHANNELS = (1, 3)
OUTPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class Segment:
    """Draws that one kernel does: flips, at most one crop, one colour, one normalisation."""

    flips_before: list[Flip] = field(default_factory=list)
    crop: Crop | None = None
    flips_after: list[Flip] = field(default_factory=list)
    color: Color | None = None
    color_first: bool = False
    scale: Scale | None = None

    def takes(self, draw: Draw) -> bool:
        """Whether a draw can come behind what is here."""
        if self.scale is not None:
            return False
        if isinstance(draw, Crop):
            return self.crop is None
        return not isinstance(draw, Color) or self.color is None

    def add(self, draw: Draw) -> None:
        """Takes a draw in."""
        if isinstance(draw, Flip):
            # A flip commutes with every colour operation.
            (self.flips_before if self.crop is None else self.flips_after).append(draw)
        elif isinstance(draw, Crop):
            self.crop, self.color_first = draw, self.color is not None
        elif isinstance(draw, Color):
            self.color = draw
        else:
            self.scale = draw


def segments(draws: Sequence[Draw]) -> list[Segment]:
    """A chain's draws, cut where one kernel does not do."""
    found: list[Segment] = []
    for draw in draws:
        if not found or not found[-1].takes(draw):
            found.append(Segment())
        found[-1].add(draw)
    return found


class Compose:
    """A chain of transforms of a batch, each image with draws of its own.

    Flips, one crop, one `ColorJitter` and one `Normalize` at the end are one kernel, in any order:
    colours before the crop see the whole image. A second crop or jitter begins a second kernel.

    Args:
        transforms: the chain; a `Compose` in it stands for its steps.
        dtype: of the output, fp32, fp16 or bf16; computation is in fp32.
        memory_format: of the output; by default that of the input.

    Raises:
        TypeError: for a step that is none of `bnres.augment`'s.
        ValueError: for another dtype; when called, as ``transforms`` and for input that is no
            batch of images.

    ``compose(images, generator)`` takes images (N, C, H, W), C 1 or 3, uint8 or floating on a scale
    from 0 to 1, and draws from ``generator``, one on the CPU (by default torch's own). Values follow
    `torchvision.transforms.v2` on float images; there are no gradients.
    """

    def __init__(
        self,
        transforms: Sequence["Transform | Compose"],
        *,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        for step in transforms:
            if not isinstance(step, Transform | Compose):
                raise TypeError(f"transforms must be of bnres.augment, got {type(step).__name__}")
        if dtype not in OUTPUT_DTYPES:
            raise ValueError(f"dtype must be fp32, fp16 or bf16, got {dtype}")
        self.transforms: list[Transform] = []
        for each in transforms:
            self.transforms += each.transforms if isinstance(each, Compose) else [each]
        self.dtype, self.memory_format = dtype, memory_format

    def draws(
        self, count: int, height: int, width: int, generator: torch.Generator | None = None
    ) -> list[Draw]:
        """What happens to each of ``count`` images of this size, step by step."""
        found = []
        for step in self.transforms:
            found.append(step.draw(count, height, width, generator))
            if isinstance(found[-1], Crop):
                height, width = found[-1].size
        return found

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check_images(images)
        n, _, height, width = images.shape
        return self.apply(images, self.draws(n, height, width, generator))

    def apply(self, images: Tensor, draws: Sequence[Draw]) -> Tensor:
        """The chain with what `draws` returned for a batch of this size."""
        _check_images(images)
        images = images.detach()
        memory_format = self.memory_format or _memory_format(images)
        parts = segments(draws) or [Segment()]
        for part in parts:
            last = part is parts[-1]
            images = _run(images, part, self.dtype if last else torch.float32, memory_format)
        return images

    def __repr__(self) -> str:
        return f"Compose([{', '.join(map(repr, self.transforms))}])"


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] not in CHANNELS:
        raise ValueError(
            f"images must be (N, C, H, W) with 1 or 3 channels, got {tuple(images.shape)}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating, got {images.dtype}")


def _memory_format(images: Tensor) -> torch.memory_format:
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _run(
    images: Tensor, part: Segment, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    plan, draws = prepare_draws(images, part, dtype, memory_format)
    if not uses_kernels(images):
        return augment_ref(images, draws, plan)
    from bnres.kernels.augment import augment

    return augment(images, draws, plan)


def prepare_draws(
    images: Tensor, part: Segment, dtype: torch.dtype, memory_format: torch.memory_format
) -> tuple[AugmentPlan, AugmentDraws]:
    """What the kernel takes for a part of a chain, on the images' device.

    Raises:
        ValueError: for images of another number of channels than the normalisation has.
    """
    n, channels, height, width = images.shape
    if part.scale is not None and len(part.scale.mean) != channels:
        raise ValueError(
            f"Normalize has {len(part.scale.mean)} channels, but images have {channels}"
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
    """Each image's box in the source and the flips behind it, int32 (N, 6); the output's size."""
    flips = [torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)]
    for flip in part.flips_before:
        axis = 0 if flip.vertical else 1
        flips[axis] = flips[axis] ^ flip.chosen
    size = (height, width)
    boxes = torch.tensor([0, 0, height, width]).expand(count, 4).clone()
    if part.crop is not None:
        size = part.crop.size
        boxes = part.crop.boxes.clone()
        # A box of the flipped image is the mirrored box of the image, flipped.
        for axis, length in ((0, height), (1, width)):
            mirrored = length - boxes[:, 2 + axis] - boxes[:, axis]
            boxes[:, axis] = torch.where(flips[axis], mirrored, boxes[:, axis])
    for flip in part.flips_after:
        axis = 0 if flip.vertical else 1
        flips[axis] = flips[axis] ^ flip.chosen
    return torch.cat((boxes, torch.stack(flips, 1).long()), 1).int(), size


def order_of(part: Segment, count: int) -> tuple[Tensor, Tensor]:
    """Packed orders and places of contrast (4: none), int32 (N, 2); factors fp32 (N, 4)."""
    if part.color is None:
        return torch.full((count, 2), 4, dtype=torch.int32), torch.zeros((count, 4))
    numbers = part.color.numbers
    shifts = torch.arange(4) * ORDER_BITS
    packed = (numbers << shifts).sum(1)
    is_contrast = numbers == CONTRAST
    place = torch.where(is_contrast.any(1), is_contrast.int().argmax(1), 4)
    return torch.stack((packed, place), 1).int(), part.color.factors.float()
