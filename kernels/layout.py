"""Describes the memory formats of tensors for per-channel operations.

In memory, every supported tensor is a dense array ``(outer, channels, inner)``. ``inner`` is the
product of the spatial sizes if the tensor is contiguous, and 1 if it is channels_last.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelView:
    """Sizes of a dense tensor seen as ``(outer, channels, inner)``."""

    outer: int
    channels: int
    inner: int

    @property
    def count(self) -> int:
        """The number of elements of one channel."""
        return self.outer * self.inner

    @property
    def numel(self) -> int:
        return self.outer * self.channels * self.inner


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` is dense and its dimension 1, the channels, is innermost in memory."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def view_of(shape: tuple[int, ...], contiguous: bool) -> ChannelView:
    """Returns the `ChannelView` of a tensor of this shape.

    The tensor is contiguous if ``contiguous`` is True, otherwise channels_last.
    """
    spatial = prod(shape[2:])
    if contiguous:
        return ChannelView(shape[0], shape[1], spatial)
    return ChannelView(shape[0] * spatial, shape[1], 1)


def pooled_size(height: int, width: int) -> tuple[int, int]:
    """Returns height and width after 3×3 max-pooling with stride 2 and padding 1."""
    return (height + 1) // 2, (width + 1) // 2


def dense(x: Tensor) -> Tensor:
    """Returns ``x`` if it is contiguous or channels_last, else a copy in one of these formats.

    The copy is channels_last if the smallest nonzero stride of ``x`` is the channels' stride,
    otherwise contiguous.
    """
    if x.is_contiguous() or is_channels_last(x):
        return x
    strides = [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1 and s > 0]
    if strides and x.stride(1) == min(strides):
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def dense_like(t: Tensor, x: Tensor) -> Tensor:
    """Returns ``t`` if it has the memory format of the dense ``x``, else a copy in that format.

    For example, an expanded gradient (with strides of 0) is copied.
    """
    if t.stride() == x.stride():
        return t
    contiguous = t.is_contiguous()
    same_view = view_of(t.shape, contiguous) == view_of(x.shape, x.is_contiguous())
    if same_view and (contiguous or is_channels_last(t)):
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)
