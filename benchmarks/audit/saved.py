"""Counts the bytes that autograd holds between a model's forward and its backward.

The model runs on meta tensors, and launches of interpreted kernels are skipped. Therefore any batch
size fits into memory. TRITON_INTERPRET=1 has to be set.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from triton.runtime.interpreter import GridExecutor

from bnres.recipes import Recipe, pack, recompute


@contextmanager
def no_launches() -> Iterator[None]:
    """Skips launches of interpreted kernels inside the context. Outputs stay uninitialised."""
    with patch.object(GridExecutor, "__call__", lambda self, *arguments, **named: None):
        yield


def saved_bytes(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    *,
    recomputes: bool = False,
) -> int:
    """Counts the bytes that a training forward saves, except parameters and buffers.

    Args:
        build: returns the model.
        shape: shape of the input.
        dtype: dtype of the model and the input.
        recomputes: whether the forward runs inside `bnres.recompute`.
    """
    with torch.device("meta"):
        model = build().to(dtype=dtype)
        x = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    held: dict[int, torch.UntypedStorage] = {}

    def keep(t: Tensor) -> Tensor | Recipe:
        packed = pack(t)
        for each in packed.tensors if isinstance(packed, Recipe) else [packed]:
            if each is not None:
                storage = each.untyped_storage()
                held[storage._cdata] = storage
        return packed

    with no_launches():
        if recomputes:
            with recompute(), torch.autograd.graph.saved_tensors_hooks(keep, lambda p: p):
                y = model(x)
        else:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda p: p):
                y = model(x)
    del y
    parameters = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    return sum(s.nbytes() for key, s in held.items() if key not in parameters)
