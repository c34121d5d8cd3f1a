"""Device functions that address a `config.Tile`: offsets, channels to and from columns, bits."""

import triton
import triton.language as tl

from bnres.kernels import config

CHANNELS = tl.constexpr(config.CHANNELS)
PLANES = tl.constexpr(config.PLANES)
GROUPS = tl.constexpr(config.GROUPS)


@triton.jit
def tile_offsets(row_start, col_block, count, C, L, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """Where a tile's elements lie in the tensor, and which exist: (UNROLL·sub_rows, block_cols)."""
    local = tl.arange(0, UNROLL * TILE.sub_rows)[:, None]
    cols = tl.arange(0, TILE.block_cols)[None, :]
    row = row_start + local
    if TILE.kind == PLANES:
        if TILE.aligned:
            vectors = L // TILE.vector
            plane = vectors * TILE.vector
            n = row // vectors
            inner = (row - n * vectors) * TILE.vector + cols
            mask = row < count // TILE.vector
        else:
            plane = L
            flat = row * TILE.vector + cols
            n = flat // L
            inner = flat - n * L
            mask = flat < count
        sample = tl.cast(C, tl.int64) * plane
        offsets = tl.cast(col_block, tl.int64) * plane + (n * sample + inner)
    else:
        if TILE.kind == GROUPS:
            stride = (C // TILE.block_channels) * TILE.group_cols
            width = TILE.group_cols
            mask = row < count // TILE.group_inner
        else:
            stride = C
            if TILE.aligned:
                stride = (C // TILE.vector) * TILE.vector
            width = TILE.block_cols
            mask = row < count
        start = tl.cast(row_start, tl.int64) * stride + tl.cast(col_block, tl.int64) * width
        offsets = start + (local * stride + cols)
        if not TILE.even:
            if TILE.kind == GROUPS:
                mask = mask & (cols < width)
            else:
                mask = mask & (cols < stride - col_block * width)
    return offsets, mask


@triton.jit
def split_rows(split, rows_per_split, count, TILE: tl.constexpr):
    """The rows of a split, from and to; none beyond the tensor, where masks have no bytes."""
    rows = tl.cast(count, tl.int64)
    if TILE.kind == PLANES:
        rows = (rows + TILE.vector - 1) // TILE.vector
    elif TILE.kind == GROUPS:
        rows = rows // TILE.group_inner
    start = tl.cast(split, tl.int64) * rows_per_split
    return start, tl.minimum(start + rows_per_split, rows)


@triton.jit
def channel_ids(col_block, C, TILE: tl.constexpr):
    """The channels of a column block, and which exist: (block_channels,)."""
    offs_c = col_block * TILE.block_channels + tl.arange(0, TILE.block_channels)
    return offs_c, offs_c < C


@triton.jit
def to_columns(v, TILE: tl.constexpr):
    """A value for each channel (block_channels,) as one for each column, broadcastable to a tile."""
    if TILE.kind == GROUPS:
        channel = tl.arange(0, TILE.block_cols) // TILE.group_inner
        v = tl.gather(v, tl.minimum(channel, TILE.block_channels - 1), 0)
    return v[None, :]


@triton.jit
def to_channels(acc, TILE: tl.constexpr, INNER_POW2: tl.constexpr):
    """Sums of a sub-tile (sub_rows, block_cols) for each channel: (block_channels,)."""
    sums = tl.sum(acc, 0)
    if TILE.kind == PLANES:
        sums = tl.sum(sums[None, :], 1)
    if TILE.kind == GROUPS:
        channel = tl.arange(0, TILE.block_channels)[:, None]
        inner = tl.arange(0, INNER_POW2)[None, :]
        index = tl.reshape(
            channel * TILE.group_inner + tl.minimum(inner, TILE.group_inner - 1),
            (TILE.block_channels * INNER_POW2,),
        )
        planes = tl.reshape(tl.gather(sums, index, 0), (TILE.block_channels, INNER_POW2))
        sums = tl.sum(tl.where(inner < TILE.group_inner, planes, 0.0), 1)
    return sums


@triton.jit
def fold(v, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """Sum over a tile's sub-tiles, inside each thread: (sub_rows, block_cols)."""
    return tl.sum(tl.reshape(v, (UNROLL, TILE.sub_rows, TILE.block_cols)), 0)


@triton.jit
def mask_offsets(row_start, col_block, count, C, L, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """Where a tile's mask bytes lie, and which exist: (sub_rows, block_cols / 2).

    A byte holds UNROLL (4) sub-tiles × 2 neighbouring columns: bit ``2u + p`` is row
    ``u·sub_rows + r``, column ``2c + p`` of the tile, so that a thread packs what it holds.
    """
    half: tl.constexpr = TILE.block_cols // 2
    local = tl.arange(0, TILE.sub_rows)[:, None]
    cols = tl.arange(0, half)[None, :]
    row = tl.cast(row_start // UNROLL, tl.int64)
    mask = cols < half
    if TILE.kind == PLANES:
        tile_rows: tl.constexpr = UNROLL * TILE.sub_rows
        tiles = (count + tile_rows * TILE.vector - 1) // (tile_rows * TILE.vector)
        start = (tl.cast(col_block, tl.int64) * (tiles * TILE.sub_rows) + row) * half
        offsets = start + (local * half + cols)
    else:
        if TILE.kind == GROUPS:
            width = TILE.group_cols // 2
            stride = (C // TILE.block_channels) * width
        else:
            width = half
            stride = (C + 1) // 2
            if TILE.aligned:
                stride = (C // TILE.vector) * (TILE.vector // 2)
        offsets = row * stride + tl.cast(col_block, tl.int64) * width + (local * stride + cols)
        if not TILE.even:
            if TILE.kind == GROUPS:
                mask = cols < width
            else:
                mask = cols < stride - col_block * width
    return offsets, mask & (local < TILE.sub_rows)


@triton.jit
def pack_bits(bits, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """Booleans of a tile as the bytes of `mask_offsets`."""
    sub = tl.reshape(bits.to(tl.int32), (UNROLL, TILE.sub_rows, TILE.block_cols))
    nibbles = tl.sum(sub << (2 * tl.arange(0, UNROLL))[:, None, None], 0)
    pairs = tl.reshape(nibbles, (TILE.sub_rows, TILE.block_cols // 2, 2))
    return tl.sum(pairs << tl.arange(0, 2)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """Bytes of `mask_offsets` as the booleans of a tile."""
    shift = (2 * tl.arange(0, UNROLL))[:, None, None, None] + tl.arange(0, 2)[None, None, None, :]
    bits = (packed.to(tl.int32)[None, :, :, None] >> shift) & 1
    return tl.reshape(bits, (UNROLL * TILE.sub_rows, TILE.block_cols)) != 0
