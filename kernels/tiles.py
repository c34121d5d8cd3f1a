"""Device functions for a `config.Tile`: offsets, loads, stores, per-channel values and mask bits.

A tile consists of UNROLL sub-tiles of (sub_rows, block_cols) elements, one below the other. A
program computes the tiles of one block of columns over a range of rows, which is called a split.
`config` explains what rows and columns are for each kind of tile.
"""

import triton
import triton.language as tl

from bnres.kernels import config
from bnres.kernels.device import bf16_pairs, round_to

CHANNELS = tl.constexpr(config.CHANNELS)
PLANES = tl.constexpr(config.PLANES)
GROUPS = tl.constexpr(config.GROUPS)


@triton.jit
def rows_exist(row_start, count, TILE: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr):
    """Returns the mask of a tile's rows or elements that exist, broadcastable to the tile.

    With WHOLE, the caller knows that all exist. Columns after the last channel are not masked.
    """
    row = row_start + tl.arange(0, UNROLL * TILE.sub_rows)[:, None]
    if WHOLE:
        mask = tl.full((UNROLL * TILE.sub_rows, 1), True, tl.int1)
    elif TILE.kind == CHANNELS:
        mask = row < count
    elif TILE.kind == GROUPS:
        mask = row < count // TILE.group_inner
    elif TILE.aligned:
        mask = row < count // TILE.vector
    else:
        mask = row * TILE.vector + tl.arange(0, TILE.block_cols)[None, :] < count
    return mask


@triton.jit
def tile_offsets(
    row_start, col_block, shape,
    TILE: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Returns the offsets of a tile's elements, and the mask of those that exist.

    Both results are broadcastable to (UNROLL·sub_rows, block_cols). If WORD is 2, the results are
    for words of two elements, and have half as many columns.
    """
    count, C, L = shape
    INDEX: tl.constexpr = tl.int32 if TILE.narrow else tl.int64
    VECTOR: tl.constexpr = TILE.vector // WORD
    local = tl.arange(0, UNROLL * TILE.sub_rows)[:, None]
    cols = tl.arange(0, TILE.block_cols // WORD)[None, :]
    mask = rows_exist(row_start, count, TILE, UNROLL, WHOLE)
    if TILE.kind == PLANES:
        row = row_start + local
        if TILE.aligned:
            vectors = L // TILE.vector
            plane = vectors * VECTOR
            n = divide(row, vectors, TILE)
        else:
            plane = L
            n = divide(row * VECTOR + cols, L, TILE)
        # Between a channel's planes in neighbouring samples are the planes of all other channels.
        skipped = (tl.cast(C, INDEX) - 1) * plane
        offsets = tl.cast(col_block, INDEX) * plane + (row * VECTOR + cols) + n * skipped
    else:
        offsets, mask = _in_rows(row_start, local, col_block, cols, mask, C, TILE, WORD)
    return offsets, mask


@triton.jit
def _in_rows(row_start, local, col_block, cols, mask, C, TILE: tl.constexpr, WORD: tl.constexpr):
    """Returns offsets and mask of a `CHANNELS` or `GROUPS` tile, for words of WORD elements."""
    INDEX: tl.constexpr = tl.int32 if TILE.narrow else tl.int64
    if TILE.kind == GROUPS:
        width = TILE.group_cols // WORD
        stride = (C // TILE.block_channels) * width
    else:
        width = TILE.block_cols // WORD
        stride = (C + WORD - 1) // WORD
        if TILE.aligned:
            stride = (C // TILE.vector) * (TILE.vector // WORD)
    start = tl.cast(row_start, INDEX) * stride + tl.cast(col_block, INDEX) * width
    if not TILE.even:
        if TILE.kind == GROUPS:
            mask = mask & (cols < width)
        else:
            mask = mask & (cols < stride - col_block * width)
    return start + (local * stride + cols), mask


@triton.jit
def divide(a, b, TILE: tl.constexpr):
    """Returns a // b for integers that are not negative."""
    if TILE.narrow:
        # Multiplies by the reciprocal of b, which the compiler computes outside of loops. The
        # product may be 1 too small, so it is corrected.
        a, b = a.to(tl.uint32), tl.cast(b, tl.uint32)
        quotient = tl.umulhi(a, tl.full((), 0xFFFFFFFF, tl.uint32) // b)
        quotient += (a - quotient * b >= b).to(tl.uint32)
        return quotient.to(tl.int32)
    else:
        return a // b


@triton.jit
def tile_at(
    row_start, col_block, shape, TILE: tl.constexpr, UNROLL: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Returns the results of `tile_offsets` for `load_tile` and for `store_tile`.

    With TILE.words, `load_tile` loads words of two elements.
    """
    at = tile_offsets(row_start, col_block, shape, TILE, UNROLL, WHOLE, 1)
    load_at = at
    if TILE.words:
        load_at = tile_offsets(row_start, col_block, shape, TILE, UNROLL, WHOLE, 2)
    return load_at, at


@triton.jit
def load_tile(ptr, load_at, TILE: tl.constexpr, ACC: tl.constexpr):
    """Returns a tile, cast to ACC. Elements that don't exist are 0."""
    offsets, mask = load_at
    if TILE.words:
        # Converting half of a word to fp32 takes one instruction, a shift or a mask. Converting a
        # separate 16-bit value takes two.
        words = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + offsets
        return bf16_pairs(tl.load(words, mask=mask, other=0))
    else:
        return tl.load(ptr + offsets, mask=mask, other=0).to(ACC)


@triton.jit
def store_tile(ptr, value, at):
    """Stores a tile, rounded to the tensor's dtype."""
    offsets, mask = at
    tl.store(ptr + offsets, round_to(value, ptr.dtype.element_ty), mask=mask)


@triton.jit
def split_rows(split, rows_per_split, count, TILE: tl.constexpr):
    """Returns the first row of a split, and the row after the split's last row."""
    INDEX: tl.constexpr = tl.int32 if TILE.narrow else tl.int64
    rows = tl.cast(count, INDEX)
    if TILE.kind == PLANES:
        rows = (rows + TILE.vector - 1) // TILE.vector
    elif TILE.kind == GROUPS:
        rows = rows // TILE.group_inner
    start = tl.cast(split, INDEX) * rows_per_split
    return start, tl.minimum(start + rows_per_split, rows)


@triton.jit
def whole_rows(start, stop, count, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """Returns the row after the last whole tile of a split.

    In a whole tile all elements exist, except in columns after the last channel.
    """
    ROWS: tl.constexpr = UNROLL * TILE.sub_rows
    if TILE.kind == PLANES:
        stop = tl.minimum(stop, count // TILE.vector)
    return start + tl.maximum(stop - start, 0) // ROWS * ROWS


@triton.jit
def channel_ids(col_block, C, TILE: tl.constexpr):
    """Returns a column block's channels and the mask of those that exist: (block_channels,)."""
    offs_c = col_block * TILE.block_channels + tl.arange(0, TILE.block_channels)
    return offs_c, offs_c < C


@triton.jit
def to_columns(v, TILE: tl.constexpr):
    """Returns per-channel values (block_channels,) in a form that is broadcastable to a tile.

    Two-dimensional values are already broadcastable and are returned unchanged.
    """
    if len(v.shape) == 2:
        return v
    else:
        if TILE.kind == GROUPS:
            channel = tl.arange(0, TILE.block_cols) // TILE.group_inner
            v = tl.gather(v, tl.minimum(channel, TILE.block_channels - 1), 0)
        return v[None, :]


@triton.jit
def to_channels(acc, TILE: tl.constexpr):
    """Returns the sum of each channel's elements in a sub-tile: (block_channels,)."""
    if TILE.kind == PLANES:
        # Each thread first adds up its own columns, so that it exchanges only one value with other
        # threads.
        sums = tl.sum(tl.sum(acc, 1)[:, None], 0)
    else:
        sums = tl.sum(acc, 0)
    if TILE.kind == GROUPS:
        channel = tl.arange(0, TILE.block_channels)[:, None]
        inner = tl.arange(0, TILE.inner_pow2)[None, :]
        index = tl.reshape(
            channel * TILE.group_inner + tl.minimum(inner, TILE.group_inner - 1),
            (TILE.block_channels * TILE.inner_pow2,),
        )
        planes = tl.reshape(tl.gather(sums, index, 0), (TILE.block_channels, TILE.inner_pow2))
        sums = tl.sum(tl.where(inner < TILE.group_inner, planes, 0.0), 1)
    return sums


@triton.jit
def mask_offsets(row_start, col_block, shape, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """Returns the offsets of a tile's mask bytes, and which bytes exist.

    Both results are broadcastable to (sub_rows, block_cols / 2). UNROLL must be 4. Bit ``2u + p``
    of byte (r, c) is for row r and column ``2c + p`` of sub-tile u. One thread has all 8 elements
    of a byte, so threads don't exchange values.
    """
    count, C, _ = shape
    INDEX: tl.constexpr = tl.int32 if TILE.narrow else tl.int64
    half: tl.constexpr = TILE.block_cols // 2
    local = tl.arange(0, TILE.sub_rows)[:, None]
    cols = tl.arange(0, half)[None, :]
    row = row_start // UNROLL
    mask = local < TILE.sub_rows  # all True
    if TILE.kind == PLANES:
        tile_rows: tl.constexpr = UNROLL * TILE.sub_rows
        tiles = (count + tile_rows * TILE.vector - 1) // (tile_rows * TILE.vector)
        start = (tl.cast(col_block, INDEX) * (tiles * TILE.sub_rows) + row) * half
        offsets = start + (local * half + cols)
    else:
        offsets, mask = _in_rows(row, local, col_block, cols, mask, C, TILE, 2)
    return offsets, mask


@triton.jit
def load_mask(
    mask_ptr, row_start, stop, col_block, shape, TILE: tl.constexpr, UNROLL: tl.constexpr
):
    """Loads the mask bytes of a tile.

    The bytes are 0 if the tile starts at or after row ``stop``, or if there is no mask.
    """
    packed = 0
    if mask_ptr is not None:
        offsets, mask = mask_offsets(row_start, col_block, shape, TILE, UNROLL)
        mask = mask & (row_start + tl.arange(0, 1)[:, None] < stop)
        packed = tl.load(mask_ptr + offsets, mask=mask, other=0)
    return packed


@triton.jit
def pack_bits(bits, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """Packs a tile's booleans into bytes in the format that `mask_offsets` describes."""
    sub = tl.reshape(bits.to(tl.int32), (UNROLL, TILE.sub_rows, TILE.block_cols))
    nibbles = tl.sum(sub << (2 * tl.arange(0, UNROLL))[:, None, None], 0)
    pairs = tl.reshape(nibbles, (TILE.sub_rows, TILE.block_cols // 2, 2))
    return tl.sum(pairs << tl.arange(0, 2)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, u, TILE: tl.constexpr):
    """Returns the booleans of sub-tile ``u`` from a tile's bytes, which `pack_bits` packed."""
    bit = tl.full((), 1, tl.int32) << (2 * u + tl.arange(0, 2)[None, None, :])
    bits = packed.to(tl.int32)[:, :, None] & bit
    return tl.reshape(bits, (TILE.sub_rows, TILE.block_cols)) != 0
