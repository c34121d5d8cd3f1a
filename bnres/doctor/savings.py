"""Computes what fusing a model saves in a training step, from shapes and without measuring.

Memory traffic is counted in passes. A pass reads or writes a tensor of the size of the batch norm's
input. Reading or writing a smaller tensor is a fraction of a pass. For example, the forward of a
batch norm takes three passes: it reads its input to compute the statistics, reads its input again
to normalise it, and writes its output. A launch starts one kernel of ATen or of bnres.

A pattern is the name that `explain` gives to fused layers, for example ``conv-bn-add-act``.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from bnres.backend import use_backend
from bnres.fusion import explain
from bnres.fusion.explain import is_norm

HALF = 2  # bytes of a 16-bit number
INDEX_BYTES = 8  # torch's max-pool writes an index of this many bytes for each output
POOLED = 1 / 4  # outputs per input of a max-pool with stride 2
# torch's batch norm has four launches in forward (num_batches_tracked, statistics, running
# statistics, output) and two in backward (sums, dx).
STOCK_NORM_LAUNCHES = 6
# A fused operation has two launches for each of its batch norms (partial statistics, combined
# statistics). It has one other launch in forward (output) and three in backward (partial sums,
# combined sums, dx).
STATISTICS_LAUNCHES, OTHER_LAUNCHES = 2, 4


def _parts(pattern: str) -> list[str]:
    return pattern.replace("+", "-").split("-")


def stock_passes(pattern: str, itemsize: int) -> float:
    """Returns how many passes torch's layers need for a pattern, in forward and backward."""
    parts = _parts(pattern)
    # Forward and backward make 3 + 5 passes for a batch norm, 3 + 0 for an addition, and 2 + 3 for
    # an activation.
    found = 8.0 * parts.count("bn") + 3 * ("add" in parts) + 5 * ("act" in parts)
    if "pool" in parts:
        found += 2 * (1 + POOLED + POOLED * INDEX_BYTES / itemsize)
    return found


def fused_passes(pattern: str, itemsize: int) -> float:
    """Returns how many passes the fused operation needs for a pattern, in forward and backward."""
    parts = _parts(pattern)
    bit = 1 / (8 * itemsize)
    # docs/performance.md has these numbers for itemsize 2, separately for forward and backward.
    if "pool" in parts:
        return 5.25 + 4 * bit
    if parts.count("bn") == 2:
        return 13.0
    if "add" in parts:
        return 10 + 2 * bit if "act" in parts else 9.0
    return 8.0


def stock_launches(pattern: str) -> int:
    """Returns how many launches torch's layers need for a pattern, in forward and backward."""
    parts = _parts(pattern)
    others = ("add" in parts) + 2 * ("act" in parts) + 2 * ("pool" in parts)
    return STOCK_NORM_LAUNCHES * parts.count("bn") + others


def fused_launches(pattern: str) -> int:
    """Returns how many launches the fused operation needs, in forward and backward."""
    norms = _parts(pattern).count("bn")
    return STATISTICS_LAUNCHES * norms + OTHER_LAUNCHES


@dataclass(frozen=True)
class Savings:
    """What fusing a model saves in a training step.

    Bytes and launches are counted only for fused batch norms and the layers fused with them.

    Attributes:
        norms: number of batch norms.
        fused: number of batch norms that are fused.
        reasons: for each batch norm that is not fused, its name and the reason.
        stock_bytes: bytes that torch's layers read and write for each image.
        fused_bytes: bytes that the fused operations read and write for each image.
        half_bytes: what ``fused_bytes`` would be in 16 bits.
        stock_launches: number of launches of torch's layers.
        fused_launches: number of launches of the fused operations.
        channels_last: whether the convolutions' filters are in channels_last.
        half: whether autocast is on, or the input's dtype has 16 bits.
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
    """Computes what fusing a model of torch's layers would save.

    ``x`` is an example of the model's input, with at least two images.
    """
    report = explain(model, x)
    sizes = _elements(model, x)
    half = x.element_size() == HALF or torch.is_autocast_enabled(x.device.type)
    itemsize = HALF if half else x.element_size()
    stock = fused = small = 0.0
    launches = [0.0, 0.0]
    for site in report.fused:
        # A pattern with two batch norms is in the report twice, so each entry counts half.
        share = 1 / _parts(site.pattern).count("bn")
        elements = sizes.get(site.name, 0) / x.shape[0] * share
        stock += stock_passes(site.pattern, itemsize) * itemsize * elements
        fused += fused_passes(site.pattern, itemsize) * itemsize * elements
        small += fused_passes(site.pattern, HALF) * HALF * elements
        launches[0] += stock_launches(site.pattern) * share
        launches[1] += fused_launches(site.pattern) * share
    return Savings(
        norms=len(report.sites), fused=len(report.fused),
        reasons={s.name: s.reason for s in report.sites if not s.fused},
        stock_bytes=round(stock), fused_bytes=round(fused), half_bytes=round(small),
        stock_launches=round(launches[0]), fused_launches=round(launches[1]),
        channels_last=is_channels_last(model), half=half,
    )  # fmt: skip


def _elements(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Returns the number of elements of each batch norm's output."""
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
    """Whether all filters of 2-d convolutions are in channels_last.

    Filters of size 1×1 and filters of one input channel are ignored, because their elements have
    the same order in both memory formats.
    """
    filters = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    return all(
        w.is_contiguous(memory_format=torch.channels_last)
        for w in filters
        if w.shape[1] > 1 and w[0, 0].numel() > 1
    )
