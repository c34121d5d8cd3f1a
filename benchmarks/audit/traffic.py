"""Counts, without running it, the bytes that a training step moves without its convolutions.

An operation of ATen is assumed to read its arguments once and to write its results once. Only
torch's batch norm is assumed to read its activations twice. For our operations, the bytes of the
sectors are used that `benchmarks.audit.memory` counts. The model runs on meta tensors.
TRITON_INTERPRET=1 has to be set.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.audit.launches import ALLOCATIONS
from benchmarks.audit.saved import no_launches

# The keys are (operation, direction). The values are the bytes of memory sectors that the operation
# touches, divided by the bytes of one activation.
Counts = Mapping[tuple[str, str], float]
# An operation of ATen reads this number of its first arguments twice.
TWICE = {"native_batch_norm": 1, "native_batch_norm_backward": 2}


def step_bytes(
    build: Callable[[], nn.Module], shape: tuple[int, ...], counts: Counts,
    dtype: torch.dtype = torch.bfloat16,
) -> int:  # fmt: skip
    """Counts the bytes of a training step in channels_last, without the optimiser."""
    with torch.device("meta"):
        model: Any = build()
        model = model.to(dtype=dtype, memory_format=torch.channels_last)
        x = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        labels = torch.empty(shape[0], dtype=torch.long)
    with no_launches(), CountBytes(counts) as mode:
        F.cross_entropy(model(x), labels).backward()
    return mode.total


class CountBytes(TorchDispatchMode):
    """Sums the bytes that operations move."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts, self.total = counts, 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = op(*args, **(kwargs or {}))
        self.total += moved(op, args, kwargs or {}, found, self.counts)
        return found


def moved(op: Any, args: tuple[Any, ...], kwargs: Any, found: Any, counts: Counts) -> int:
    """Returns the bytes that a call of ``op`` moves. It is 0 for convolutions and for views."""
    name = op.overloadpacket.__name__
    if op.namespace == "bnres":
        given = dict(zip([a.name for a in op._schema.arguments], args, strict=False))
        return round(counts[our_operation(name, given)] * _size(given["x"]))
    if op.is_view or name in ALLOCATIONS or "convolution" in name:
        return 0
    touched = [*tree_leaves((args, kwargs, found)), *args[: TWICE.get(name, 0)]]
    return sum(_size(t) for t in touched if isinstance(t, Tensor))


def our_operation(name: str, given: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the key in `Counts` that belongs to a call of ``bnres::batch_norm_act_*``."""
    step = name.removeprefix("batch_norm_act_")
    fork = "_fork" if given.get("dy_skip") is not None else ""
    if given["pools"]:
        return f"bn_relu_pool{fork}", step
    if given["has_residual_norm"]:
        return f"dual_bn_add_relu{fork}", step
    added = given["residual"] is not None if step == "forward" else given["dresidual"]
    return f"{'bn_add_relu' if added else 'bn_relu'}{fork}", step


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size()
