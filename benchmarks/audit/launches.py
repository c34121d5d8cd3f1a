"""Counts the launches of a model's training step, without running its kernels.

The model runs on meta tensors. Launches of interpreted kernels are counted instead of executed.
TRITON_INTERPRET=1 has to be set.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

# These operations of ATen launch nothing, because they only allocate memory.
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class CountOperations(TorchDispatchMode):
    """Counts the operations of ATen that read or write memory, but not our own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = op.overloadpacket.__name__
        ours = op.namespace == "bnres"
        self.count += not (ours or op.is_view or name in ALLOCATIONS)
        return op(*args, **(kwargs or {}))


def step_launches(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns how often a training step launches Triton kernels and calls operations of ATen.

    The step does not include the optimiser.
    """
    launched = 0

    def launch(self: GridExecutor, *arguments: Any, **named: Any) -> None:
        nonlocal launched
        launched += 1

    with torch.device("meta"):
        model, x = build(), torch.empty(shape)
        labels = torch.empty(shape[0], dtype=torch.long)
    with patch.object(GridExecutor, "__call__", launch):
        F.cross_entropy(model(x), labels).backward()
    model.zero_grad()
    # A dispatch mode does not see the launches of our operators. They were counted above.
    with patch.object(GridExecutor, "__call__", lambda *_, **__: None), CountOperations() as mode:
        F.cross_entropy(model(x), labels).backward()
    return launched, mode.count
