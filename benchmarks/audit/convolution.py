"""Replaces torch's convolution on the CPU with a function that computes nothing.

The results are uninitialised, but have the right shapes, strides and dtypes. torch still records
the operation for backward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.library import _scoped_library

Sizes = Sequence[int]
LAST = torch.channels_last


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes,
    transposed: bool, output_padding: Sizes, groups: int,
) -> Tensor:  # fmt: skip
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    shape = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    plain = all(t.is_contiguous() or not t.is_contiguous(memory_format=LAST) for t in (x, weight))
    return torch.empty(
        (x.shape[0], weight.shape[0], *shape), dtype=x.dtype,
        memory_format=torch.contiguous_format if plain else LAST,
    )  # fmt: skip


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sizes | None, stride: Sizes, padding: Sizes,
    dilation: Sizes, transposed: bool, output_padding: Sizes, groups: int, mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(weight) if mask[1] else None,
        dy.new_empty(weight.shape[0]) if mask[2] else None,
    )


@contextmanager
def convolutions_compute_nothing() -> Iterator[None]:
    """Inside the context, convolutions on the CPU and their backward compute nothing."""
    with _scoped_library("aten", "IMPL") as library:
        library.impl("convolution", _convolution, "CPU")
        library.impl("convolution_backward", _convolution_backward, "CPU")
        yield
