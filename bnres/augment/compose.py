"""Chains of transforms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bnres.augment.draws import Crop, Draw
from bnres.augment.segments import apply_draws, size_of
from bnres.augment.transforms import Transform

OUTPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Compose:
    """A chain of transforms. It augments a batch, with random parameters for each image.

    ``compose(images, generator)`` augments images (N, C, H, W) with 1 or 3 channels. The images are
    either uint8 or floating point from 0 to 1. Random parameters are drawn from ``generator``, a
    CPU generator, or by default from torch's global generator. The results agree with those of
    `torchvision.transforms.v2` on float images. The output has no gradient.

    One kernel can compute flips, one crop and one `ColorJitter`, in any order, followed by one
    `Normalize`. A second crop or jitter, or a step after `Normalize`, needs a second kernel.

    The contrast of `ColorJitter` depends on an image's mean gray. It is the mean of the cropped
    image if the crop comes before the jitter, otherwise of the whole image.

    Args:
        transforms: the steps of the chain. A step can be another `Compose`.
        dtype: dtype of the output: fp32, fp16 or bf16. Computation is in fp32.
        memory_format: memory format of the output, by default the input's.

    Raises:
        TypeError: if a step is not a transform of `bnres.augment`.
        ValueError: if ``dtype`` is not fp32, fp16 or bf16. A call also raises it if the input is
            not a batch of images, or if a step does not accept the input.
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
                raise TypeError(
                    f"transforms must be transforms of bnres.augment, got {type(step).__name__}"
                )
        if dtype not in OUTPUT_DTYPES:
            raise ValueError(f"dtype must be fp32, fp16 or bf16, got {dtype}")
        self.transforms: list[Transform] = []
        for each in transforms:
            self.transforms += each.transforms if isinstance(each, Compose) else [each]
        self.dtype, self.memory_format = dtype, memory_format

    def draws(
        self, count: int, height: int, width: int, generator: torch.Generator | None = None
    ) -> list[Draw]:
        """Draws the random parameters of each step for ``count`` images of the given size."""
        found = []
        for step in self.transforms:
            found.append(step.draw(count, height, width, generator))
            if isinstance(found[-1], Crop):
                height, width = found[-1].size
        return found

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.apply(images, self.draws(*size_of(images), generator))

    def apply(self, images: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Applies the chain to a batch.

        Args:
            images: the batch.
            draws: the result of the method `draws` for the number and size of these images.
        """
        return apply_draws(images, draws, self.dtype, self.memory_format)

    def __repr__(self) -> str:
        return f"Compose([{', '.join(map(repr, self.transforms))}])"
