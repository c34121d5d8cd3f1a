"""What fusing a model saves in a training step, derived from shapes: nothing is measured.

Bytes are counted in passes over the activation that a batch norm normalises: a batch norm reads it once
for its statistics and once to apply them. Launches are those of ATen's own kernels against ours.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from bnres.backend import use_backend
from bnres.fusion import explain
from bnres.fusion.explain import is_norm

HALF, SINGLE = 2, 4
INDEX_BYTES = 8  # of torch's max-pool, for each output
POOLED = 1 / 4  # outputs of a max-pool of stride 2 for each of its inputs
# Each counts its batch, makes statistics, running statistics and output; and in backward sums and dx.
STOCK_NORM_LAUNCHES = 6
# Of ours: statistics, their combination; the output; backward's sums, their combination; dx.
STATISTICS_LAUNCHES, OTHER_LAUNCHES = 2, 4


def _parts(pattern: str) -> list[str]:
    return pattern.replace("+", "-").split("-")


def stock_passes(pattern: str, itemsize: int) -> float:
    """Passes of torch's own layers, forward and backward, in place of a pattern of `explain`."""
    parts = _parts(pattern)
    found = 8.0 * parts.count("bn") + 3 * ("add" in parts) + 5 * ("act" in parts)
    if "pool" in parts:
        found += 2 * (1 + POOLED + POOLED * INDEX_BYTES / itemsize)
    return found


def fused_passes(pattern: str, itemsize: int) -> float:
    """Passes of our operation, forward and backward."""
    parts = _parts(pattern)
    bit = 1 / (8 * itemsize)
    if "pool" in parts:
        return 5.25 + 4 * bit
    if parts.count("bn") == 2:
        return 13.0
    if "add" in parts:
        return 10 + 2 * bit if "act" in parts else 9.0
    return 8.0


def stock_launches(pattern: str) -> int:
    """Launches of torch's own layers, forward and backward."""
    parts = _parts(pattern)
    others = ("add" in parts) + 2 * ("act" in parts) + 2 * ("pool" in parts)
    return STOCK_NORM_LAUNCHES * parts.count("bn") + others


def fused_launches(pattern: str) -> int:
    """Launches of our operation, forward and backward."""
    norms = _parts(pattern).count("bn")
    return STATISTICS_LAUNCHES * norms + OTHER_LAUNCHES


@dataclass(frozen=True)
class Savings:
    """What is derived for a model, for a training step; bytes are for each image.

    Attributes:
        norms: batch norms of the model.
        fused: those of them that our operations run.
        reasons: why the others are not fused, by name.
        stock_bytes, fused_bytes: moved by the fused sites, in the model's precision.
        half_bytes: by the fused sites fused, in 16 bits.
        stock_launches, fused_launches: of the fused sites.
        channels_last: whether the convolutions' filters are in channels_last.
        half: whether autocast is on, or the activations have 16 bits anyway.
    """

    norms: int
    fused: int
    reasons: dict[str, str]
    stock_bytes: int
    fused_bytes: int
    half_bytes: int
    stock_launches: int
    fused_launches: int
    channels_last: bool
    half: bool


def derive(model: nn.Module, x: torch.Tensor) -> Savings:
    """The savings of a model in the mode that it is in.

    Args:
        model: of torch's own layers.
        x: an example of its input, of two images or more.
    """
    report = explain(model, x)
    sizes = _elements(model, x)
    half = x.element_size() == HALF or torch.is_autocast_enabled(x.device.type)
    itemsize = HALF if half else x.element_size()
    stock = fused = small = 0.0
    launches = [0.0, 0.0]
    for site in report.fused:
        # A site of two batch norms has two rows.
        share = 1 / _parts(site.pattern).count("bn")
        elements = sizes.get(site.name, 0) / x.shape[0] * share
        stock += stock_passes(site.pattern, itemsize) * itemsize * elements
        fused += fused_passes(site.pattern, itemsize) * itemsize * elements
        small += fused_passes(site.pattern, HALF) * HALF * elements
        launches[0] += stock_launches(site.pattern) * share
        launches[1] += fused_launches(site.pattern) * share
    return Savings(
        norms=len(report.sites), fused=len(report.fused), reasons={s.name: s.reason for s in report.sites if not s.fused},
        stock_bytes=round(stock), fused_bytes=round(fused), half_bytes=round(small),
        stock_launches=round(launches[0]), fused_launches=round(launches[1]),
        channels_last=is_channels_last(model), half=half,
    )  # fmt: skip


def _elements(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Elements that each batch norm of a model normalises, by a call of a copy."""
    found: dict[str, int] = {}
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        if is_norm(module):

            def note(_: nn.Module, __: object, y: torch.Tensor, name: str = name) -> None:
                found[name] = y.numel()

            module.register_forward_hook(note)
    with torch.no_grad(), use_backend("aten"):
        twin(x)
    return found


def is_channels_last(model: nn.Module) -> bool:
    """Whether every filter of a 2-d convolution that has more than one tap is in channels_last."""
    filters = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    return all(
        w.is_contiguous(memory_format=torch.channels_last)
        for w in filters
        if w.shape[1] > 1 and w[0, 0].numel() > 1
    )
