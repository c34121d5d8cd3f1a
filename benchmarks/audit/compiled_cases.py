"""The calls whose machine code is audited: fused operations, convolutions and augmentations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.audit.operations import steps
from benchmarks.operations import LAYOUTS
from benchmarks.sites import RESNET18_SITES, Site, operations_at
from bnres import models
from bnres.kernels.augment import augment
from bnres.kernels.augment_plan import AugmentDraws, AugmentPlan
from bnres.kernels.conv import conv_bn_act
from bnres.kernels.norm import Norm, RunningStatistics
from bnres.routes import ConvCall
from bnres.tune import conv_calls

BATCH = 256
CONV_INPUT = (BATCH, 3, 224, 224)
DTYPES = BF16, FP32 = (torch.bfloat16, torch.float32)
LAST = "channels_last"


@dataclass(frozen=True)
class Case:
    """A call whose kernels are compiled but not run.

    Attributes:
        title: description of the call.
        layout: memory layout of the activations.
        dtype: dtype of the activations.
        batch: number of images.
        run: makes the call.
    """

    title: str
    layout: str
    dtype: torch.dtype
    batch: int
    run: Callable[[], None]


def _empty(*shape: int, dtype: torch.dtype, layout: str = LAST) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=LAYOUTS[layout])


def _step_case(site: Site, batch: int, layout: str, dtype: torch.dtype) -> Case:
    """Returns the case of an operation: forward in evaluation and in training, then backward."""

    def run() -> None:
        tensor = partial(_empty, *site.shape(batch), dtype=dtype, layout=layout)
        for step in steps(site.operation, tensor).values():
            step()

    return Case(f"{site.name} {site.operation} batch {batch}", layout, dtype, batch, run)


def _conv_case(call: ConvCall) -> Case:
    """Returns the case of a convolution followed by batch norm and ReLU, in evaluation."""

    def run() -> None:
        tensor = partial(_empty, dtype=dtype)
        x = tensor(call.batch, call.channels, call.height, call.width)
        filter = tensor(call.out_channels, call.channels, call.shape.kernel_h, call.shape.kernel_w)
        channel = torch.empty(call.out_channels)
        size = call.shape.output_size(call.height, call.width)
        residual = tensor(call.batch, call.out_channels, *size) if call.has_residual else None
        norm = Norm(RunningStatistics(channel, channel, 1e-5), channel, channel)
        conv_bn_act(x, filter, None, norm, residual, "relu", 0.0, call.shape)

    dtype = getattr(torch, call.dtype)
    return Case(call.key, LAST, dtype, call.batch, run)


def _augment_case(batch: int, size: int, out: int, color_first: bool) -> Case:
    """Returns the case of flip, crop, colour jitter and normalisation, from uint8 to bf16."""

    def run() -> None:
        plan = AugmentPlan(
            out, out, resizes=True, has_color=True, has_contrast=True, color_first=color_first,
            mean=(0.5,) * 3, std=(0.2,) * 3, dtype=BF16, memory_format=LAYOUTS[LAST],
        )  # fmt: skip
        draws = AugmentDraws(
            torch.empty((batch, 6), dtype=torch.int32), torch.empty((batch, 2), dtype=torch.int32),
            torch.empty((batch, 4)),
        )  # fmt: skip
        augment(torch.empty((batch, 3, size, size), dtype=torch.uint8), draws, plan)

    order = "colours first" if color_first else "crop first"
    return Case(f"augment {size} to {out}, {order}", LAST, torch.uint8, batch, run)


def all_cases() -> list[Case]:
    """Lists all cases: the fused operations of ResNet-18, convolutions and augmentations."""
    variants = (
        (BATCH, LAST, BF16),
        (32, LAST, BF16),
        (BATCH, "contiguous", BF16),
        (BATCH, LAST, FP32),
        (BATCH, "contiguous", FP32),
    )
    steps = [
        _step_case(fused, batch, layout, dtype)
        for batch, layout, dtype in variants
        for site in RESNET18_SITES
        for fused in operations_at(site)
    ]
    return [*steps, *map(_conv_case, _convs()), *_augment_cases()]


def family_cases() -> list[Case]:
    """Lists a few cases that together launch every kernel."""
    sites = {fused.operation: fused for site in RESNET18_SITES for fused in operations_at(site)}
    names = ("bn_relu_pool", "bn_add_relu_fork", "dual_bn_add_relu")
    steps = [_step_case(sites[name], BATCH, LAST, BF16) for name in names]
    convs = [c for c in _convs() if c.has_residual and c.dtype == "bfloat16" and c.shape.taps == 9]
    narrow, wide = (next(c for c in convs if c.channels == channels) for channels in (64, 512))
    return [*steps, _conv_case(narrow), _conv_case(wide), *_augment_cases()]


def _convs() -> list[ConvCall]:
    """Lists the convolutions of ResNet-18 and ResNet-50 that our kernel supports."""
    return [
        call
        for name in ("resnet18", "resnet50")
        for dtype in DTYPES
        for call in conv_calls(models.create_model(name, fused=False), CONV_INPUT, dtype)
    ]


def _augment_cases() -> list[Case]:
    """Lists augmentations of small images (as in CIFAR) and of large images (as in ImageNet).

    A small image needs one program of the kernel, a large image several. The colours are changed
    before or after the resize.
    """
    return [
        _augment_case(batch, size, out, color_first)
        for batch, size, out in ((1024, 32, 32), (256, 256, 224))
        for color_first in (False, True)
    ]
