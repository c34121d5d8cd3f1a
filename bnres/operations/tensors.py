"""Brings tensors into the form that the kernels take."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnres.kernels.layout import dense, dense_like


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward can follow."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def as_kernels_take(inputs: Any) -> Any:
    """An operation's inputs: x and a residual dense, of one dtype and layout, the others packed."""
    found = {
        name: packed(t) for name, t in inputs._asdict().items() if name not in ("x", "residual")
    }
    x, residual = inputs.x, getattr(inputs, "residual", None)
    if residual is not None and residual.dtype != x.dtype:
        # The dtype of x + residual; autocast gives such pairs.
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    found["x"] = x = dense(x)
    if residual is not None:
        residual = dense_like(residual, x)
        # torch.compile takes no tensor twice.
        found["residual"] = x.view_as(x) if residual is x else residual
    return inputs._replace(**found)


def packed(t: Tensor | None) -> Tensor | None:
    """A tensor of a value for each channel as one dimension without gaps."""
    if t is None or (t.dim() == 1 and t.is_contiguous()):
        return t
    return t.reshape(-1).contiguous()


def counted(counter: Tensor | None, x: Tensor) -> Tensor | None:
    """The counter for the kernels, or None: one that they can't write to is counted here."""
    if counter is None or (counter.dtype == torch.int64 and counter.device == x.device):
        return counter
    counter.add_(1)
    return None


def packed_buffers(buffers: Any, x: Tensor) -> Any:
    """An operation's buffers without gaps; batches are counted here where the kernels can't."""
    return type(buffers)(
        *(
            counted(t, x) if name.endswith("counter") else None if t is None else t.contiguous()
            for name, t in buffers._asdict().items()
        )
    )


def copy_back(buffers: Any, packed: Any, names: Sequence[str]) -> None:
    """Writes what training wrote to copies of some buffers to the buffers themselves."""
    for name in names:
        buffer, copy = getattr(buffers, name), getattr(packed, name)
        if buffer is not None and copy is not None and copy is not buffer:
            buffer.copy_(copy)


def empty_sums(statistics: Tensor, x: Tensor, count: int) -> list[Tensor]:
    """Tensors of a value for each channel, in the type of the statistics."""
    return [statistics.new_empty(x.shape[1]) for _ in range(count)]


def as_dtype_of(t: Tensor, computed: Tensor) -> Tensor:
    """``computed`` in the dtype of ``t``. (`torch.Tensor.to` is slow even where there is nothing to do.)"""
    return computed if computed.dtype == t.dtype else computed.to(t.dtype)
