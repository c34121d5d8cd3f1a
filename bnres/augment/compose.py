"""Chains of transforms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bnres.augment.draws import Crop, Draw
from bnres.augment.segments import apply_draws, size_of
from bnres.augment.transforms import Transform

OUTPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
        return self.apply(images, self.draws(*size_of(images), generator))

    def apply(self, images: Tensor, draws: Sequence[Draw]) -> Tensor:
        """The chain with what `draws` returned for a batch of this size."""
        return apply_draws(images, draws, self.dtype, self.memory_format)

    def __repr__(self) -> str:
        return f"Compose([{', '.join(map(repr, self.transforms))}])"
