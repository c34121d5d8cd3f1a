"""Allocates the outputs of launchers.

A launcher is a function that launches kernels. It allocates its outputs with these functions,
unless its caller passes them as ``out``, in the order in which the launcher returns them.
"""

from functools import lru_cache

import torch
from torch import Tensor

from bnres.kernels.config import CHANNELS, MASK_UNROLL, PLANES, tile_for, tile_rows
from bnres.kernels.conv_config import ConvShape
from bnres.kernels.dtypes import acc_type
from bnres.kernels.layout import pooled_size, view_of

# At most this many mask sizes are cached.
MASKS = 4096


def empty_channels(x: Tensor, count: int) -> list[Tensor]:
    """Returns ``count`` uninitialised tensors (C,), in fp64 if ``x`` is fp64, otherwise in fp32."""
    channels, dtype = x.shape[1], acc_type(x)
    return [x.new_empty(channels, dtype=dtype) for _ in range(count)]


def empty_moments(x: Tensor, norms: int = 1) -> Tensor:
    """Returns a tensor (3·norms, C) for count, mean and M2 = Σ(x − mean)² of each batch norm.

    The dtype is fp64 if ``x`` is fp64, otherwise fp32. Every element is preset to the count, so a
    kernel needs to write only mean and M2.
    """
    # If x is empty, no kernel runs. Then mean and M2 stay 0, like the count.
    return x.new_full((3 * norms, x.shape[1]), x.numel() // x.shape[1], dtype=acc_type(x))


def empty_mask(x: Tensor) -> Tensor:
    """Returns an uninitialised mask with one bit per element of a dense ``x``, as bytes (uint8)."""
    given = x.shape, x.is_contiguous(), x.itemsize
    try:
        size = _mask_bytes(*given)
    except TypeError:  # torch.compile's symbolic sizes can't be cached, as they have no hash
        size = _mask_bytes.__wrapped__(*given)
    return torch.empty(size, dtype=torch.uint8, device=x.device)


@lru_cache(MASKS)
def _mask_bytes(shape: torch.Size, contiguous: bool, itemsize: int) -> int:
    """Returns the size in bytes of a mask in the format of `tiles.mask_offsets`."""
    if 0 in shape:  # numel would turn symbolic sizes into constants
        return 0
    view = view_of(shape, contiguous)
    tile = tile_for(view, itemsize)
    blocks = -(-tile_rows(view, tile) // (MASK_UNROLL * tile.sub_rows))
    if tile.kind == PLANES:
        width = view.channels * tile.block_cols // 2
    elif tile.kind == CHANNELS:
        width = (view.channels + 1) // 2
    else:
        width = view.channels * view.inner // 2
    return blocks * tile.sub_rows * width


def empty_pooled(x: Tensor) -> Tensor:
    """Returns an uninitialised tensor (N, C, OH, OW) in the dtype and memory format of ``x``."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    # torch.empty parses separate sizes faster than a tuple.
    sizes = x.shape[0], x.shape[1], *pooled_size(x.shape[2], x.shape[3])
    return torch.empty(*sizes, dtype=x.dtype, device=x.device, memory_format=layout)


def empty_convolved(x: Tensor, out_channels: int, shape: ConvShape) -> Tensor:
    """Returns an uninitialised channels_last tensor (N, K, OH, OW) in the dtype of ``x``."""
    sizes = x.shape[0], out_channels, *shape.output_size(x.shape[2], x.shape[3])
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
