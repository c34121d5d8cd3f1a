"""Builds each provider's chain of augmentations."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import AugmentCase
from benchmarks.check import check
from benchmarks.operations import DTYPES, LAYOUTS
from benchmarks.providers.base import Unavailable
from bnres import augment, use_backend
from bnres.augment.segments import prepare_draws, segments

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (0.5, 0.2, 0.6, 0.4)  # brightness, contrast, saturation and hue, as in the d2l.ai course
# The greatest allowed relative error of the kernel's output, compared with ATen's. The kernel and
# ATen add numbers in different orders and round the results to bf16.
TOLERANCE = 2**-7


@dataclass(frozen=True)
class Work:
    """A chain of augmentations that is ready to be timed.

    Attributes:
        run: augments one batch of images.
        verify: returns the relative error of the augmented images. Raises
            `benchmarks.check.WrongResult` if the error exceeds ``TOLERANCE``. For torchvision,
            ``verify`` only checks the shape and that all values are finite, and returns 0.
        bytes_moved: bytes of the images plus bytes of the augmented images.
    """

    run: Callable[[], object]
    verify: Callable[[], float]
    bytes_moved: int


def prepare(case: AugmentCase, device: torch.device) -> Work:
    """Builds the chain of augmentations that a case times.

    Raises:
        Unavailable: if the provider's library can't be imported, or if the provider needs a GPU
            and ``device`` is a CPU.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, 3, case.size, case.size)
    images = torch.randint(256, shape, device=device, generator=generator, dtype=torch.uint8)
    written = case.batch * 3 * case.out**2 * DTYPES[case.dtype].itemsize
    run, verify = _bnres(case, images) if case.provider.startswith("bnres") else _peer(case, images)
    return Work(run, verify, images.numel() + written)


Calls = tuple[Callable[[], Tensor], Callable[[], float]]


def _bnres(case: AugmentCase, images: Tensor) -> Calls:
    chain = augment.Compose(
        [
            augment.RandomHorizontalFlip(),
            augment.RandomResizedCrop(case.out),
            augment.ColorJitter(*JITTER),
            augment.Normalize(MEAN, STD),
        ],
        dtype=DTYPES[case.dtype],
        memory_format=LAYOUTS[case.layout],
    )
    generator = torch.Generator().manual_seed(0)
    draws = chain.draws(case.batch, case.size, case.size, generator)

    def verify() -> float:
        with use_backend("aten"):
            expected = chain.apply(images, draws)
        return check("image", [chain.apply(images, draws)], [expected], TOLERANCE)

    if case.provider == "bnres":
        return lambda: chain(images, generator), verify
    if images.device.type != "cuda":
        raise Unavailable("the kernel needs a GPU")
    from bnres.kernels.augment import augment as launch

    (part,) = segments(draws)
    plan, on_device = prepare_draws(images, part, chain.dtype, LAYOUTS[case.layout])
    return lambda: launch(images, on_device, plan), verify


def _peer(case: AugmentCase, images: Tensor) -> Calls:
    try:
        importlib.import_module("benchmarks.torchvision_import")
        v2 = importlib.import_module("torchvision.transforms.v2")
    except ImportError as error:
        raise Unavailable(f"torchvision can't be imported: {error}") from error
    chain = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomHorizontalFlip(),
            v2.RandomResizedCrop(case.out),
            v2.ColorJitter(*JITTER),
            v2.Normalize(MEAN, STD),
        ]
    )
    dtype, memory_format = DTYPES[case.dtype], LAYOUTS[case.layout]

    def run() -> Tensor:
        if case.provider == "torchvision-batch":
            y = chain(images)
        else:
            y = torch.stack([chain(image) for image in images])
        return y.to(dtype).contiguous(memory_format=memory_format)

    def verify() -> float:
        # torchvision and bnres draw different random numbers, so the values can't be compared.
        y = run()
        assert y.shape == (case.batch, 3, case.out, case.out) and y.isfinite().all()
        return 0.0

    return run, verify
