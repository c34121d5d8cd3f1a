"""Brings tensors into the form that the kernels take."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bnres.backend import uses_kernels
from bnres.kernels.layout import dense, dense_like


def dense_pair(input: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both dense, of one dtype and lying in memory alike."""
    if other is not None and other.dtype != input.dtype:
        # As input + other would: autocast leaves such pairs behind.
        dtype = torch.promote_types(input.dtype, other.dtype)
        input, other = input.to(dtype), other.to(dtype)
    input = dense(input)
    if other is not None:
        other = dense_like(other, input)
        if other is input:  # torch.compile takes no tensor twice
            other = input.view_as(input)
    return input, other


def batch_counter(
    num_batches_tracked: Tensor | None, training: bool, input: Tensor
) -> Tensor | None:
    """The counter if a kernel is to count the batch, else None; then it is counted here."""
    if num_batches_tracked is None or not training:
        return None
    if (
        uses_kernels(input)
        and num_batches_tracked.dtype == torch.int64
        and num_batches_tracked.device == input.device
    ):
        return num_batches_tracked
    num_batches_tracked.add_(1)
    return None


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward can follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def packed_parameters(*parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters of one dimension, without gaps."""
    return [
        p if p is None or (p.dim() == 1 and p.is_contiguous()) else p.reshape(-1).contiguous()
        for p in parameters
    ]


@contextmanager
def packed_buffers(training: bool, *buffers: Tensor | None) -> Iterator[list[Tensor | None]]:
    """Buffers without gaps; what training writes into copies is copied back."""
    packed = [None if b is None else b.contiguous() for b in buffers]
    yield packed
    for buffer, copy in zip(buffers, packed, strict=True):
        if training and buffer is not None and copy is not None and copy is not buffer:
            buffer.copy_(copy)
