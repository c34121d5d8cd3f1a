"""The cases of the machine-code audit: a training step, convolutions and augmentations."""

from dataclasses import dataclass

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

CONV_INPUT = (256, 3, 224, 224)
DTYPES = (torch.bfloat16, torch.float32)
CONV_LAYOUT = AUGMENT_LAYOUT = "channels_last"


@dataclass(frozen=True)
class Case:
    """An operation on the tensors of one batch norm of a net. Its launches are compiled."""

    site: Site
    batch: int
    layout: str
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.site.name} {self.site.operation} {self.layout} {dtype} batch {self.batch}"


def empty(case: Case) -> Tensor:
    """Returns a tensor of the case's shape, whose memory is never accessed."""
    return torch.empty(
        case.site.shape(case.batch), dtype=case.dtype, memory_format=LAYOUTS[case.layout]
    )


def launch_step(case: Case) -> None:
    """Launches a case's forward in training, its forward in evaluation and its backward."""
    for step in steps(case.site.operation, lambda: empty(case)).values():
        step()


def launch_conv(call: ConvCall) -> None:
    """Launches a convolution followed by batch norm and ReLU, in evaluation."""
    dtype, last = getattr(torch, call.dtype), LAYOUTS[CONV_LAYOUT]

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, memory_format=last)

    x = tensor(call.batch, call.channels, call.height, call.width)
    filter = tensor(call.out_channels, call.channels, call.shape.kernel_h, call.shape.kernel_w)
    channel = torch.empty(call.out_channels)
    size = call.shape.output_size(call.height, call.width)
    residual = tensor(call.batch, call.out_channels, *size) if call.has_residual else None
    norm = Norm(RunningStatistics(channel, channel, 1e-5), channel, channel)
    conv_bn_act(x, filter, None, norm, residual, "relu", 0.0, call.shape)


def all_cases() -> list[Case]:
    """Lists every operation at every batch norm, for several batch sizes, layouts and dtypes."""
    bf16, fp32 = DTYPES
    variants = (
        (256, "channels_last", bf16),
        (32, "channels_last", bf16),
        (256, "contiguous", bf16),
        (256, "channels_last", fp32),
        (256, "contiguous", fp32),
    )
    return [
        Case(fused, batch, layout, dtype)
        for batch, layout, dtype in variants
        for site in RESNET18_SITES
        for fused in operations_at(site)
    ]


def family_cases() -> list[Case]:
    """Lists one case for each family of kernels."""
    sites = {fused.operation: fused for site in RESNET18_SITES for fused in operations_at(site)}
    names = ("bn_relu_pool", "bn_add_relu_fork", "dual_bn_add_relu")
    return [Case(sites[name], 256, "channels_last", torch.bfloat16) for name in names]


def all_convs() -> list[ConvCall]:
    """Lists the convolutions of ResNet-18 and ResNet-50 that our kernel supports."""
    return [
        call
        for name in ("resnet18", "resnet50")
        for dtype in DTYPES
        for call in conv_calls(models.create_model(name, fused=False), CONV_INPUT, dtype)
    ]


def family_convs() -> list[ConvCall]:
    """Lists a 3×3 convolution of layer1 and one of layer4. Both have a residual and are in bf16."""
    calls = [c for c in all_convs() if c.has_residual and c.dtype == "bfloat16"]
    return [
        next(c for c in calls if (c.channels, c.shape.taps) == sought)
        for sought in ((64, 9), (512, 9))
    ]


@dataclass(frozen=True)
class AugmentCase:
    """A chain of flip, crop, colour jitter and normalisation of uint8 images to bf16."""

    batch: int
    size: int
    out: int
    color_first: bool

    def __str__(self) -> str:
        order = "colours first" if self.color_first else "crop first"
        return f"augment {self.batch} of {self.size} to {self.out}, {order}"


def augment_cases() -> list[AugmentCase]:
    """Lists augmentations of CIFAR's and ImageNet's images.

    An image of CIFAR is small enough for one program. Colours are changed before or after the
    resize.
    """
    return [
        AugmentCase(batch, size, out, color_first)
        for batch, size, out in ((1024, 32, 32), (256, 256, 224))
        for color_first in (False, True)
    ]


def launch_augment(case: AugmentCase) -> None:
    """Launches the kernels of a chain."""
    plan = AugmentPlan(
        case.out, case.out, resizes=True, has_color=True, has_contrast=True,
        color_first=case.color_first, mean=(0.5,) * 3, std=(0.2,) * 3, dtype=torch.bfloat16,
        memory_format=LAYOUTS[AUGMENT_LAYOUT],
    )  # fmt: skip
    n = case.batch
    draws = AugmentDraws(
        torch.empty((n, 6), dtype=torch.int32), torch.empty((n, 2), dtype=torch.int32),
        torch.empty((n, 4)),
    )  # fmt: skip
    augment(torch.empty((n, 3, case.size, case.size), dtype=torch.uint8), draws, plan)
