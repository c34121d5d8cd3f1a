"""Convolution that hands sums of its output to the batch norm behind it, for training.

Each program sums its tile of the output while it is in registers, and a small kernel combines the
tiles, so that batch norm has no pass of its own for its statistics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.conv import convolution, empty_output
from bnres.kernels.conv_config import ConvConfig, ConvShape
from bnres.kernels.conv_tile import conv_tile
from bnres.kernels.device import round_to
from bnres.kernels.launch import launch, launch_scope

# Tiles whose sums are combined by one program, and the tile of that program.
TILES_PER_SPLIT = 64
COMBINE_TILES, COMBINE_CHANNELS = 16, 32


@triton.jit
def _conv_sums_kernel(
    y_ptr,
    partial_ptr,
    x_ptr,
    filter_ptr,
    M,
    H,
    W,
    C,
    OH,
    OW,
    K_OUT,
    SHAPE: tl.constexpr,
    ROW_CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNED_IN: tl.constexpr,
    ALIGNED_OUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """y = conv(x); of each tile and channel a pivot, Σ(y − pivot) and its square: (3, tiles, K_OUT).

    The sums are of y as it is stored. The pivot is the tile's mean, or a number near it: any finite
    one gives right sums, and a near one keeps them from cancelling.
    """
    acc, offs_m, offs_n = conv_tile(
        x_ptr, filter_ptr, M, H, W, C, OH, OW, K_OUT, SHAPE, ROW_CHANNELS, BLOCK_M, BLOCK_N, BLOCK_K,
        ALIGNED_IN, EVEN_K, PRECISION, INDEX,
    )  # fmt: skip
    stride_k = K_OUT
    if ALIGNED_OUT > 1:
        stride_k = (K_OUT // ALIGNED_OUT) * ALIGNED_OUT
    tile, tiles = tl.program_id(0) // tl.cdiv(K_OUT, BLOCK_N), tl.cdiv(M, BLOCK_M)
    inside, mask_n = (offs_m < M)[:, None], offs_n < K_OUT
    y = round_to(acc, y_ptr.dtype.element_ty)
    offsets = (offs_m * stride_k)[:, None] + offs_n[None, :]
    tl.store(y_ptr + offsets, y, mask=inside & mask_n[None, :])
    stored = tl.where(inside, y.to(tl.float32), 0.0)
    rows = tl.minimum(M - tl.cast(tile, tl.int64) * BLOCK_M, BLOCK_M)
    pivot = tl.sum(stored, 0) / rows
    pivot = tl.where(tl.abs(pivot) < 1e38, pivot, 0.0)
    d = tl.where(inside, stored - pivot[None, :], 0.0)
    out = partial_ptr + tl.cast(tile, INDEX) * K_OUT + offs_n
    plane = tl.cast(tiles, INDEX) * K_OUT
    tl.store(out, pivot, mask=mask_n)
    tl.store(out + plane, tl.sum(d, 0), mask=mask_n)
    tl.store(out + 2 * plane, tl.sum(d * d, 0), mask=mask_n)


@triton.jit
def _conv_combine_kernel(
    sums_ptr,
    partial_ptr,
    M,
    K_OUT,
    tiles,
    BLOCK_M: tl.constexpr,
    TILES_PER_SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Σ(y − pivot) and its square over a split's tiles, about the first tile's pivot, and that one.

    sums is (2·splits + 1, K_OUT), in fp64.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < K_OUT
    first = tl.load(partial_ptr + offs_c, mask=mask_c, other=0).to(tl.float64)
    if split == 0:
        tl.store(sums_ptr + 2 * tl.cast(splits, tl.int64) * K_OUT + offs_c, first, mask=mask_c)
    plane = tl.cast(tiles, tl.int64) * K_OUT
    sum_d = tl.full((BLOCK_S, BLOCK_C), 0.0, tl.float64)
    sum_d2 = tl.full((BLOCK_S, BLOCK_C), 0.0, tl.float64)
    for start in tl.range(0, TILES_PER_SPLIT, BLOCK_S):
        tile = split * TILES_PER_SPLIT + start + tl.arange(0, BLOCK_S)
        mask = (tile < tiles)[:, None] & mask_c[None, :]
        at = partial_ptr + tile.to(tl.int64)[:, None] * K_OUT + offs_c[None, :]
        pivot = tl.load(at, mask=mask, other=0).to(tl.float64)
        d = tl.load(at + plane, mask=mask, other=0).to(tl.float64)
        d2 = tl.load(at + 2 * plane, mask=mask, other=0).to(tl.float64)
        rows = tl.minimum(M - tile.to(tl.int64) * BLOCK_M, BLOCK_M).to(tl.float64)[:, None]
        shift = pivot - first[None, :]
        sum_d += tl.where(mask, d + rows * shift, 0.0)
        sum_d2 += tl.where(mask, d2 + (2 * d + rows * shift) * shift, 0.0)
    out = sums_ptr + tl.cast(split, tl.int64) * K_OUT + offs_c
    tl.store(out, tl.sum(sum_d, 0), mask=mask_c)
    tl.store(out + tl.cast(splits, tl.int64) * K_OUT, tl.sum(sum_d2, 0), mask=mask_c)


def conv_sums(
    x: Tensor, filter: Tensor, shape: ConvShape, *, config: ConvConfig | None = None
) -> tuple[Tensor, Tensor]:
    """y = conv2d(x), and its sums for `bnres.kernels.bn_forward.bn_stats`: (2·splits + 1, K), fp64.

    ``x`` (N, C, H, W) and ``filter`` (K, C, R, S) are channels_last in memory, of one type of fp16,
    bf16 and fp32.
    """
    y = empty_output(x, filter, shape)
    channels = y.shape[1]
    if y.numel() == 0:
        return y, torch.zeros((1, channels), dtype=torch.float64, device=x.device)
    config, arguments = convolution(x, filter, y, shape, config)
    rows = y.numel() // channels
    tiles, splits = -(-rows // config.block_m), split_count(rows, config)
    partial = torch.empty((3, tiles, channels), dtype=torch.float32, device=x.device)
    sums = torch.empty((2 * splits + 1, channels), dtype=torch.float64, device=x.device)
    with launch_scope(x):
        launch(
            _conv_sums_kernel,
            config.grid(rows, channels),
            y_ptr=y,
            partial_ptr=partial,
            **arguments,
        )
        launch(
            _conv_combine_kernel,
            (splits, -(-channels // COMBINE_CHANNELS)),
            sums_ptr=sums,
            partial_ptr=partial,
            M=rows,
            K_OUT=channels,
            tiles=tiles,
            BLOCK_M=config.block_m,
            TILES_PER_SPLIT=TILES_PER_SPLIT,
            BLOCK_S=COMBINE_TILES,
            BLOCK_C=COMBINE_CHANNELS,
        )
    return y, sums


def split_count(rows: int, config: ConvConfig) -> int:
    """Splits of the sums over ``rows`` positions."""
    return -(-rows // (config.block_m * TILES_PER_SPLIT))
