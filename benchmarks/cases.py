"""Lists every case that can be measured, the most important ones first.

A case is one operation, net or chain of augmentations, run by one provider. A provider is one of
the implementations that are compared, such as bnres or torch's own layers (``eager``). Each case
has a rank. Cases with a lower rank are measured first.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from benchmarks.operations import DIRECTIONS
from benchmarks.sites import (
    NETS,
    RESNET18_SITES,
    RESNET50_SITES,
    ConvSite,
    Site,
    conv_sites,
    operations_at,
)

OP_PROVIDERS = (
    "bnres", "eager", "compile", "cudnn-frontend", "eager-fp16-cudnn", "bnres-conv-kernel",
    "compile-max-autotune",
)  # fmt: skip
MODEL_PROVIDERS = (
    "bnres", "eager", "compile", "eager-fp16-cudnn", "bnres-recompute", "compile-max-autotune",
)  # fmt: skip
AUGMENT_PROVIDERS = ("bnres", "bnres-kernel", "torchvision-batch", "torchvision-image")
BASELINE = "eager"
# These providers are measured before the others, because the others are compared with them.
BASELINES = (BASELINE, "torchvision-batch")
PROVIDERS = tuple(dict.fromkeys(OP_PROVIDERS + MODEL_PROVIDERS + AUGMENT_PROVIDERS))
BATCH = 256
SMOKE_BATCH = 4
SMOKE_IMAGES = {224: 64, 32: 16}
# In training, these operations in the stages ``LARGE_SITES`` are measured before other operations.
TELLING = ("bn_relu", "bn_add_relu", "bn_relu_pool")
# Stages of a net whose activations are at least about as large as an H100's L2 cache (50 MB). In
# ResNet-18, with 256 images in bf16, each activation has at least 51 MB.
LARGE_SITES = ("stem", "layer1", "layer2")
# For whole nets, these providers are measured before the others.
HEADLINE = ("bnres", "eager", "compile")
# `telling_cases` returns the cases whose rank is lower than this number.
TELLING_RANK = 4
LAST_RANK = 12


@dataclass(frozen=True)
class OpCase:
    """One operation with the shapes that it has in a net, run by one provider.

    Attributes:
        site: batch norm or convolution of a net. It determines the operation and the shapes.
        direction: ``forward`` (training), ``backward`` or ``eval``.
        layout: ``channels_last`` or ``contiguous``.
        dtype: dtype of the activations: ``bf16``, ``fp16`` or ``fp32``.
        batch: number of images.
        provider: implementation that is measured, one of `OP_PROVIDERS`.
        smoke: whether the tensors are smaller than those of the site, to test the benchmark itself.
    """

    site: Site | ConvSite
    direction: str
    layout: str
    dtype: str
    batch: int
    provider: str
    smoke: bool = False
    suite = "ops"

    @property
    def subject(self) -> str:
        """The id without the provider. It is equal for cases that are compared with each other."""
        size = "smoke" if self.smoke else f"b{self.batch}"
        return "/".join(
            (self.suite, self.site.operation, self.site.id, self.direction, self.layout,
             self.dtype, size)
        )  # fmt: skip

    @property
    def id(self) -> str:
        return f"{self.subject}/{self.provider}"


@dataclass(frozen=True)
class ModelCase:
    """One training step or one inference of a whole net, or the memory of a training step.

    Attributes:
        suite: ``step``, ``infer`` or ``memory``.
        net: ``resnet18`` or ``resnet50``.
        image: height and width of the images. If they are at most 32, the net starts with a 3×3
            convolution, as is usual for CIFAR.
        batch: number of images.
        launch: ``eager`` (the host launches each kernel) or ``graph`` (one CUDA graph).
        dtype: dtype of autocast in training, and of all tensors in inference.
        layout: ``channels_last`` or ``contiguous``.
        provider: implementation that is measured, one of `MODEL_PROVIDERS`.
        smoke: whether the input is small, to test the benchmark itself.
    """

    suite: str
    net: str
    image: int
    batch: int
    launch: str
    dtype: str
    layout: str
    provider: str
    smoke: bool = False

    @property
    def subject(self) -> str:
        """The id without the provider. It is equal for cases that are compared with each other."""
        size = "smoke" if self.smoke else f"b{self.batch}"
        return "/".join(
            (self.suite, self.net, f"{self.image}px", size, self.launch, self.layout, self.dtype)
        )

    @property
    def id(self) -> str:
        return f"{self.subject}/{self.provider}"


@dataclass(frozen=True)
class AugmentCase:
    """A chain of flip, resized crop, colour jitter and normalisation on a batch of uint8 images.

    Attributes:
        name: data set whose image sizes are used: ``cifar`` or ``imagenet``.
        batch: number of images.
        size: height and width of the images.
        out: height and width of the output.
        dtype: dtype of the output.
        layout: memory layout of the output.
        provider: implementation that is measured:

            - ``bnres`` draws the random parameters and runs the kernels.
            - ``bnres-kernel`` only runs the kernels.
            - ``torchvision-batch`` uses the same random parameters for all images.
            - ``torchvision-image`` augments one image after the other, each with its own
              parameters.
        smoke: whether the batch is small, to test the benchmark itself.
    """

    name: str
    batch: int
    size: int
    out: int
    dtype: str
    layout: str
    provider: str
    smoke: bool = False
    suite = "augment"

    @property
    def subject(self) -> str:
        """The id without the provider. It is equal for cases that are compared with each other."""
        size = "smoke" if self.smoke else f"b{self.batch}"
        return f"augment/{self.name}/{self.size}px-{self.out}px/{size}/{self.layout}/{self.dtype}"

    @property
    def id(self) -> str:
        return f"{self.subject}/{self.provider}"


Case = OpCase | ModelCase | AugmentCase


def bn_sites(net: str) -> list[Site]:
    """Lists the operations to measure at a net's batch norms: fused ones, then plain batch norm."""
    sites = RESNET18_SITES if net == "resnet18" else RESNET50_SITES
    plain = [site for site in sites if site.operation == "bn"]
    return [fused for site in sites for fused in operations_at(site)] + plain


def _directions(site: Site | ConvSite) -> tuple[str, ...]:
    if isinstance(site, ConvSite):
        return ("eval",)
    return ("backward",) if site.operation.endswith("fork") else DIRECTIONS


def _op_subjects() -> Iterator[tuple[int, OpCase]]:
    """Yields (rank, case) for each operation, always with the first provider."""
    for net in NETS:
        later = 4 if net == "resnet50" else 0
        sites: list[Site | ConvSite] = [*bn_sites(net), *conv_sites(net)]
        for site in sites:
            is_conv = isinstance(site, ConvSite)
            is_large = isinstance(site, Site) and site.name in LARGE_SITES
            for direction in _directions(site):
                first = OpCase(site, direction, "channels_last", "bf16", BATCH, OP_PROVIDERS[0])
                is_telling = is_large and site.operation in TELLING and direction != "eval"
                yield (2 if is_telling else 4) + later, first
                yield 8, replace(first, batch=32)
                yield 9, replace(first, dtype="fp32")
                if not is_conv:
                    yield 9, replace(first, layout="contiguous")
                    yield 10, replace(first, layout="contiguous", dtype="fp32")
                yield 10, replace(first, dtype="fp16")


def _model_subjects() -> Iterator[tuple[int, ModelCase]]:
    for net in NETS:
        later = 4 if net == "resnet50" else 0
        for suite, image, batch, launch, rank in (
            ("step", 224, 256, "graph", 0),  # The time of a replayed graph does not include Python.
            ("step", 224, 32, "graph", 0),
            ("step", 224, 256, "eager", 1),
            ("step", 224, 32, "eager", 1),
            ("infer", 224, 256, "eager", 3),
            ("memory", 224, 256, "eager", 3),
            ("infer", 224, 32, "graph", 3),
            ("step", 32, 256, "graph", 4),
            ("step", 32, 256, "eager", 4),
            ("step", 224, 128, "eager", 7),
            ("infer", 224, 128, "eager", 7),
            ("infer", 32, 256, "graph", 7),
        ):
            case = ModelCase(
                suite, net, image, batch, launch, "bf16", "channels_last", MODEL_PROVIDERS[0]
            )
            yield rank + later, case
            if suite == "step" and batch == 256 and image == 224 and launch == "eager":
                yield 9, replace(case, layout="contiguous")
                yield 9, replace(case, dtype="fp32")


def _augment_subjects() -> Iterator[tuple[int, AugmentCase]]:
    for name, batch, size, out in (("cifar", 1024, 32, 32), ("imagenet", 256, 256, 224)):
        yield (
            3,
            AugmentCase(name, batch, size, out, "bf16", "channels_last", AUGMENT_PROVIDERS[0]),
        )


PROVIDERS_OF = {
    OpCase: OP_PROVIDERS,
    ModelCase: MODEL_PROVIDERS,
    AugmentCase: AUGMENT_PROVIDERS,
}
# These providers are not measured in inference of a net. ``bnres-recompute`` only changes training.
# ``eager-fp16-cudnn`` measures cuDNN's batch norm, which torch does not use with the fp16
# parameters that the net has in inference.
TRAINING_ONLY = ("bnres-recompute", "eager-fp16-cudnn")
# These providers are measured last. Autotuning takes minutes for each net, and a loop over the
# images in Python takes seconds for each call.
LATE = ("compile-max-autotune", "torchvision-image")


def _ranked() -> list[tuple[int, Case]]:
    """Returns (rank, case) for every case, the lowest rank first.

    Of equal rank, operations come first, followed by nets and augmentations.
    """
    ranked: list[tuple[int, Case]] = []
    subjects: list[tuple[int, Case]] = [*_op_subjects(), *_model_subjects(), *_augment_subjects()]
    for rank, subject in subjects:
        for provider in sorted(PROVIDERS_OF[type(subject)], key=lambda p: p not in BASELINES):
            if provider == "bnres-conv-kernel" and not _is_conv(subject):
                continue
            if subject.suite == "infer" and provider in TRAINING_ONLY:
                continue
            if provider in LATE:
                least = LAST_RANK
            elif isinstance(subject, ModelCase) and provider not in HEADLINE:
                least = 3
            else:
                least = 0
            ranked.append((max(rank, least), replace(subject, provider=provider)))
    return sorted(ranked, key=lambda pair: pair[0])


def all_cases() -> list[Case]:
    """Lists every case, the most important ones first."""
    return [case for _, case in _ranked()]


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """Groups consecutive cases that differ only in their provider."""
    return [list(group) for _, group in groupby(cases, key=lambda case: case.subject)]


def telling_cases() -> list[Case]:
    """Lists the most important cases, whose rank is below ``TELLING_RANK``."""
    return [case for rank, case in _ranked() if rank < TELLING_RANK]


def _is_conv(case: Case) -> bool:
    return isinstance(case, OpCase) and isinstance(case.site, ConvSite)


def smoke_cases() -> list[Case]:
    """Lists cases with small inputs.

    The list has one case for each of these combinations:

    - an operation, a direction, a layout and a provider
    - a suite of `ModelCase`, an image size and a provider
    - a chain of augmentations and a provider
    """
    found: dict[str, Case] = {}
    for case in all_cases():
        if isinstance(case, OpCase):
            dtype = "bf16" if case.layout == "channels_last" else "fp32"
            small: Case = replace(case, batch=SMOKE_BATCH, dtype=dtype, smoke=True)
            key = f"{case.site.operation}/{case.direction}/{case.layout}/{case.provider}"
        elif isinstance(case, AugmentCase):
            small = replace(case, batch=SMOKE_BATCH, smoke=True)
            key = small.id
        else:
            if case.net != "resnet18" or case.layout != "channels_last" or case.dtype != "bf16":
                continue
            image = SMOKE_IMAGES[case.image]
            small = replace(
                case, image=image, batch=SMOKE_BATCH, launch="eager", dtype="fp32", smoke=True
            )
            key = small.id
        found.setdefault(key, small)
    return list(found.values())


def default_cases() -> list[Case]:
    """Lists all cases if there is a GPU, else the cases with small inputs."""
    return all_cases() if torch.cuda.is_available() else smoke_cases()
