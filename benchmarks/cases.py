"""What can be measured: every case by name, the most telling ones first."""

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

SUITES = ("ops", "step", "infer", "memory", "groups", "augment")
OP_PROVIDERS = (
    "bnres", "eager", "compile", "cudnn-frontend", "eager-fp16-cudnn", "bnres-conv-kernel", "apex",
    "flag_gems", "compile-max-autotune",
)  # fmt: skip
MODEL_PROVIDERS = (
    "bnres", "eager", "compile", "eager-fp16-cudnn", "bnres-recompute", "compile-max-autotune",
)  # fmt: skip
AUGMENT_PROVIDERS = ("bnres", "bnres-kernel", "torchvision-batch", "torchvision-image")
BASELINE = "eager"
# Measured first of a group: the others are compared with them.
BASELINES = (BASELINE, "torchvision-batch")
PROVIDERS = tuple(dict.fromkeys(OP_PROVIDERS + MODEL_PROVIDERS + AUGMENT_PROVIDERS))
BATCH = 256
SMOKE_BATCH = 4
SMOKE_IMAGES = {224: 64, 32: 16}
# An operation or a direction of its own; the rest of a site's are timed after the telling ones.
TELLING = ("bn_relu", "bn_add_relu", "bn_relu_pool")
# The others of ResNet-18 fit into an L2 cache.
LARGE_SITES = ("stem", "layer1", "layer2")
# Of the nets' providers, those whose steps are compared first.
HEADLINE = ("bnres", "eager", "compile")
# Cases of a lower rank are worth a GPU's time in any run.
TELLING_RANK = 4
LAST_RANK = 12


@dataclass(frozen=True)
class OpCase:
    """One operation at one site, by one provider.

    Attributes:
        site: where; it names the operation.
        direction: ``forward`` (training), ``backward`` or ``eval``.
        layout: ``channels_last`` or ``contiguous``.
        dtype: ``bf16``, ``fp16`` or ``fp32``, of the activations.
        batch: images.
        provider: whose implementation.
        smoke: a small tensor in place of the site's.
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
        """What is measured, whoever provides it."""
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
    """A whole net: a training step, inference, or a training step's memory or kernels.

    Attributes:
        suite: ``step``, ``infer``, ``memory`` or ``groups`` (a step's kernel time by group).
        net: ``resnet18`` or ``resnet50``.
        image: height and width; up to 32 with CIFAR's stem.
        batch: images.
        launch: ``eager`` (each kernel by the host) or ``graph`` (one CUDA graph).
        dtype: of autocast in training, of all tensors in inference.
        layout: ``channels_last`` or ``contiguous``.
        provider: whose layers.
        smoke: a small input in place of this one.
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
        """What is measured, whoever provides it."""
        size = "smoke" if self.smoke else f"b{self.batch}"
        return "/".join(
            (self.suite, self.net, f"{self.image}px", size, self.launch, self.layout, self.dtype)
        )

    @property
    def id(self) -> str:
        return f"{self.subject}/{self.provider}"


@dataclass(frozen=True)
class AugmentCase:
    """A chain of flip, resized crop, jitter and normalise on a batch of uint8 images.

    Attributes:
        name: whose sizes: ``cifar`` or ``imagenet``.
        batch: images.
        size: their height and width.
        out: that of the output.
        dtype: of the output.
        layout: of the output.
        provider: ``bnres`` (draws and all), ``bnres-kernel`` (what it launches, alone),
            ``torchvision-batch`` (one draw for all images) or ``torchvision-image``.
        smoke: a few images in place of the batch.
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
        """What is measured, whoever provides it."""
        size = "smoke" if self.smoke else f"b{self.batch}"
        return f"augment/{self.name}/{self.size}px-{self.out}px/{size}/{self.layout}/{self.dtype}"

    @property
    def id(self) -> str:
        return f"{self.subject}/{self.provider}"


Case = OpCase | ModelCase | AugmentCase


def bn_sites(net: str) -> list[Site]:
    """Every fused operation at every batch norm of a net, and plain batch norm."""
    sites = RESNET18_SITES if net == "resnet18" else RESNET50_SITES
    plain = [site for site in sites if site.operation == "bn"]
    return [fused for site in sites for fused in operations_at(site)] + plain


def _directions(site: Site | ConvSite) -> tuple[str, ...]:
    if isinstance(site, ConvSite):
        return ("eval",)
    return ("backward",) if site.operation.endswith("fork") else DIRECTIONS


def _op_subjects() -> Iterator[tuple[int, OpCase]]:
    """Cases of the first provider, each with its rank; the lowest is measured first."""
    for net in NETS:
        sites: list[Site | ConvSite] = [*bn_sites(net), *conv_sites(net)]
        for site in sites:
            is_conv = isinstance(site, ConvSite)
            for direction in _directions(site):
                first = OpCase(site, direction, "channels_last", "bf16", BATCH, OP_PROVIDERS[0])
                on_rank = 4
                if (
                    isinstance(site, Site)
                    and site.name in LARGE_SITES
                    and site.operation in TELLING
                    and direction != "eval"
                ):
                    on_rank = 2
                yield on_rank + (4 if net == "resnet50" else 0), first
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
            ("step", 224, 256, "graph", 0),  # measures kernels, not Python
            ("step", 224, 32, "graph", 0),
            ("step", 224, 256, "eager", 1),
            ("step", 224, 32, "eager", 1),
            ("infer", 224, 256, "eager", 3),
            ("memory", 224, 256, "eager", 3),
            ("infer", 224, 32, "graph", 3),
            ("groups", 224, 256, "eager", 3),
            ("groups", 224, 32, "eager", 4),
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
# In inference the norms of an fp16 net are in fp16, which torch does not send to cuDNN.
TRAINING_ONLY = ("bnres-recompute", "eager-fp16-cudnn")
# Autotuning takes minutes a net, and a loop over the images in Python takes seconds a call.
LATE = {"compile-max-autotune": LAST_RANK, "torchvision-image": LAST_RANK}


def _ranked() -> list[tuple[int, int, Case]]:
    ranked: list[tuple[int, int, Case]] = []
    order = 0
    subjects: list[tuple[int, Case]] = [*_op_subjects(), *_model_subjects(), *_augment_subjects()]
    for rank, subject in subjects:
        for provider in sorted(PROVIDERS_OF[type(subject)], key=lambda p: p not in BASELINES):
            if provider == "bnres-conv-kernel" and not _is_conv(subject):
                continue
            if subject.suite == "infer" and provider in TRAINING_ONLY:
                continue
            if subject.suite == "groups" and provider not in HEADLINE:
                continue
            late = LATE.get(provider, 0)
            if isinstance(subject, ModelCase) and provider not in HEADLINE:
                late = max(late, 3)
            case: Case = replace(subject, provider=provider)
            ranked.append((max(rank, late), order, case))
        order += 1
    return sorted(ranked, key=lambda r: r[:2])


def all_cases() -> list[Case]:
    """Every case, in the order in which they are worth measuring."""
    return [case for _, _, case in _ranked()]


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases that follow one another and measure the same thing, by several providers."""
    return [list(group) for _, group in groupby(cases, key=lambda case: case.subject)]


def telling_cases() -> list[Case]:
    """Those of them that a GPU's time is spent on first."""
    return [case for rank, _, case in _ranked() if rank < TELLING_RANK]


def _is_conv(case: Case) -> bool:
    return isinstance(case, OpCase) and isinstance(case.site, ConvSite)


def smoke_cases() -> list[Case]:
    """Every operation, direction, layout and provider once, and every kind of step, in small."""
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


def site_name(case: Case) -> str:
    """Where a case measures: a site, a net, or whose images."""
    if isinstance(case, OpCase):
        return case.site.id
    return case.net if isinstance(case, ModelCase) else case.name


def select(
    cases: Iterable[Case],
    *,
    suite: str = "all",
    sites: Iterable[str] = (),
    providers: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    layouts: Iterable[str] = (),
) -> list[Case]:
    """The cases asked for; an empty choice is every one.

    Args:
        cases: to choose from.
        suite: one of `SUITES`, or ``all``.
        sites: starts of sites' names, such as ``resnet18`` or ``resnet50.layer1``; of a whole net,
            its name; of augmentation, ``cifar`` or ``imagenet``.
        providers, dtypes, layouts: names.
    """
    sites, providers = tuple(sites), tuple(providers)
    dtypes, layouts = tuple(dtypes), tuple(layouts)
    return [
        case
        for case in cases
        if suite in ("all", case.suite)
        and (not sites or site_name(case).startswith(sites))
        and (not providers or case.provider in providers)
        and (not dtypes or case.dtype in dtypes)
        and (not layouts or case.layout in layouts)
    ]


def default_cases() -> list[Case]:
    """Every case on a GPU; without one those in small."""
    return all_cases() if torch.cuda.is_available() else smoke_cases()
