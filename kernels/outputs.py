"""Allocates what the launchers write, for them and for callers that allocate it beforehand."""

import torch
from torch import Tensor

from bnres.kernels.config import CHANNELS, MASK_UNROLL, PLANES, tile_for, tile_rows
from bnres.kernels.conv_config import ConvShape
from bnres.kernels.dtypes import acc_type
from bnres.kernels.layout import ChannelView, channel_view
from bnres.kernels.norm import Statistics, Sums
from bnres.kernels.window import Window


def empty_statistics(x: Tensor) -> Statistics:
    """mean and rstd of each channel, in fp32 (or fp64)."""
    mean, rstd = (x.new_empty(x.shape[1], dtype=acc_type(x)) for _ in range(2))
    return Statistics(mean, rstd)


def empty_sums(x: Tensor, has_residual_norm: bool) -> Sums:
    """Sums of each channel, in fp32 (or fp64)."""
    return Sums(*(x.new_empty(x.shape[1], dtype=acc_type(x)) for _ in range(2 + has_residual_norm)))


def empty_mask(x: Tensor) -> Tensor:
    """The 1-bit mask of a dense ``x``."""
    size = mask_bytes(channel_view(x), x.element_size()) if x.numel() else 0
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def mask_bytes(view: ChannelView, itemsize: int) -> int:
    """Size of the 1-bit mask of a tensor; its format belongs to `tiles.mask_offsets`."""
    tile = tile_for(view, itemsize)
    blocks = -(-tile_rows(view, tile) // (MASK_UNROLL * tile.sub_rows))
    if tile.kind == PLANES:
        width = view.channels * tile.block_cols // 2
    elif tile.kind == CHANNELS:
        width = (view.channels + 1) // 2
    else:
        width = view.channels * view.inner // 2
    return blocks * tile.sub_rows * width


def empty_pooled(x: Tensor, window: Window, ceil_mode: bool, dtype: torch.dtype) -> Tensor:
    """(N, C, OH, OW) in the memory format of ``x``."""
    return torch.empty(
        (*x.shape[:2], *window.output_size(x.shape[2], x.shape[3], ceil_mode)),
        dtype=dtype,
        device=x.device,
        memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last,
    )


def empty_convolved(x: Tensor, out_channels: int, shape: ConvShape) -> Tensor:
    """(N, K, OH, OW), channels_last."""
    return torch.empty(
        (x.shape[0], out_channels, *shape.output_size(x.shape[2], x.shape[3])),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
