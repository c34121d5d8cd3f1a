"""Tile geometry and launch configurations: pure functions of a tensor's shape.

A program processes one block of columns over a range of rows:

==========  ======================  =========================  ======================
kind        used for                a row is                   a column is
==========  ======================  =========================  ======================
`CHANNELS`  channels_last           one position               one channel
`PLANES`    contiguous              one vector of one channel  one element of a vector
`GROUPS`    contiguous, small odd   one sample                 one element of a group
            planes (7×7, 14×14)                                of adjacent channels
==========  ======================  =========================  ======================

The geometry of tiles is derived from byte counts and from code compiled for sm_90. `TUNING` was
measured on an H200 at the sizes of ResNet-18, in bfloat16 (`benchmarks/NOTES.md`, section 8).
`python -m benchmarks variants` times alternatives.
"""

from dataclasses import dataclass
from math import gcd, prod

from bnres.kernels.layout import ChannelView, pooled_size

CHANNELS, PLANES, GROUPS = 0, 1, 2

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
VECTOR_BYTES = 16
# Tensors that have fewer elements after padding to whole tiles are addressed by 32-bit offsets.
NARROW_LIMIT = 2**31 - 2**24
# Kernels that read or write the 1-bit mask must unroll by this factor, as its format depends on it.
MASK_UNROLL = 4


@dataclass(frozen=True)
class Tile:
    """Geometry of a tile, known at compile time.

    It depends only on shape, memory format and dtype, so that forward and backward agree on it. A
    *sub-tile* of ``sub_rows × block_cols`` is one 16-byte vector for each of the program's 128
    threads.

    Attributes:
        kind: `CHANNELS`, `PLANES` or `GROUPS`.
        sub_rows: rows of a sub-tile, a power of two.
        block_cols: columns of a tile, a power of two.
        block_channels: channels in a column block.
        group_inner: elements of a plane in a `GROUPS` tile, else 0.
        vector: elements per 16-byte vector.
        aligned: whether every row starts at a multiple of the vector.
        even: whether no column needs a mask.
        narrow: whether offsets have 32 bits, not 64.
        words: whether two bfloat16 are loaded as one 32-bit word.
    """

    kind: int
    sub_rows: int
    block_cols: int
    block_channels: int
    group_inner: int
    vector: int
    aligned: bool
    even: bool
    narrow: bool
    words: bool

    @property
    def group_cols(self) -> int:
        """Number of columns that a `GROUPS` tile uses, at most ``block_cols``."""
        return self.block_channels * self.group_inner

    @property
    def inner_pow2(self) -> int:
        """``group_inner``, rounded up to a power of two."""
        return next_power_of_2(self.group_inner)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def channels_per_group(view: ChannelView, vector: int) -> int:
    """Returns the number of channels in a `GROUPS` tile, or 0 if no number fits.

    Their planes in one sample fill whole vectors, and at most one vector per thread.
    """
    size = vector // gcd(view.inner, vector)
    limit = THREADS * vector
    if view.channels % size or size * view.inner > limit:
        return 0
    while view.channels % (2 * size) == 0 and 2 * size * view.inner <= limit:
        size *= 2
    return size


def tile_for(view: ChannelView, itemsize: int) -> Tile:
    """Returns the tile geometry of a tensor with this view and ``itemsize`` bytes per element."""
    vector = VECTOR_BYTES // itemsize
    group = 0
    if view.inner == 1:
        kind, block_cols = CHANNELS, min(max(next_power_of_2(view.channels), 2), 8 * vector)
        block_channels, aligned = block_cols, view.channels % vector == 0
        even = view.channels % block_cols == 0
    elif view.inner % vector and (group := channels_per_group(view, vector)):
        kind, block_cols = GROUPS, next_power_of_2(group * view.inner)
        block_channels, aligned = group, True
        even = block_cols == group * view.inner
    else:
        kind, block_cols, block_channels = PLANES, vector, 1
        aligned = even = view.inner % vector == 0
    return Tile(
        kind=kind,
        sub_rows=THREADS * vector // block_cols,
        block_cols=block_cols,
        block_channels=block_channels,
        group_inner=view.inner if group else 0,
        vector=vector,
        aligned=aligned,
        even=even,
        # Each channel's last tile may be almost empty, but the mask has bytes for the whole tile.
        narrow=view.numel + view.channels * MASK_UNROLL * THREADS * vector < NARROW_LIMIT,
        words=False,
    )


def tile_rows(view: ChannelView, tile: Tile) -> int:
    """Rows of the whole tensor in one column block."""
    return -(-view.count // tile.vector) if tile.kind == PLANES else view.outer


@dataclass(frozen=True)
class KernelTuning:
    """Launch parameters of a kernel.

    Attributes:
        unroll: sub-tiles that a thread holds at once (independent loads).
        num_stages: depth of the software pipeline over tiles (1: none).
        programs_per_sm: programs per multiprocessor. Programs that don't fit at once start when
            others end.
        eviction: the ``eviction_policy`` of triton's loads, a hint to the L2 cache.
    """

    unroll: int
    num_stages: int
    programs_per_sm: int
    eviction: str = ""


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched over a tensor.

    Attributes:
        col_blocks: column blocks, the first axis of the grid.
        splits: programs that share the rows of one column block, the second axis.
        rows_per_split: rows of each split, a multiple of ``unroll * sub_rows``.
    """

    col_blocks: int
    splits: int
    rows_per_split: int


# With more column blocks than ``programs_per_sm * sm_count``, the grid has this many times as many
# programs.
TURNS = 4

TUNING = {
    "stats": KernelTuning(unroll=4, num_stages=4, programs_per_sm=2),
    "apply": KernelTuning(unroll=MASK_UNROLL, num_stages=4, programs_per_sm=24),
    "apply_residual": KernelTuning(unroll=MASK_UNROLL, num_stages=3, programs_per_sm=20),
    "reduce": KernelTuning(unroll=MASK_UNROLL, num_stages=3, programs_per_sm=2),
    "dx": KernelTuning(unroll=MASK_UNROLL, num_stages=3, programs_per_sm=16),
    "apply_two_norms": KernelTuning(unroll=2, num_stages=3, programs_per_sm=3),
    "reduce_two_norms": KernelTuning(unroll=2, num_stages=3, programs_per_sm=3),
    "dx_two_norms": KernelTuning(unroll=2, num_stages=3, programs_per_sm=12),
    "pool": KernelTuning(unroll=1, num_stages=4, programs_per_sm=6),
    "pool_dx": KernelTuning(unroll=1, num_stages=4, programs_per_sm=6),
}


def launch_config(kernel: str, view: ChannelView, tile: Tile, sm_count: int) -> LaunchConfig:
    """Splits the rows so that every multiprocessor has work for any number of channels.

    The grid has at most ``programs_per_sm * sm_count`` programs, with two exceptions. With few rows
    each program gets one block of rows, so that more loads are in flight. With more column blocks
    than programs, the grid has about `TURNS` times as many programs, so that all multiprocessors
    end at about the same time.
    """
    tuning = TUNING[kernel]
    block_rows = tuning.unroll * tile.sub_rows
    row_blocks = max(-(-tile_rows(view, tile) // block_rows), 1)
    col_blocks = -(-view.channels // tile.block_channels)
    programs = tuning.programs_per_sm * sm_count
    wanted = programs // col_blocks or -(-TURNS * programs // col_blocks)
    blocks_per_split = 1 if 2 * row_blocks < 3 * wanted else -(-row_blocks // wanted)
    splits = -(-row_blocks // blocks_per_split)
    return LaunchConfig(col_blocks, splits, blocks_per_split * block_rows)


@dataclass(frozen=True)
class ColumnConfig:
    """How a kernel over columns of pooling windows is launched.

    Attributes:
        tile: each row of it is one column of windows: one ow of a sample (channels_last), or a
            vector of adjacent ow of a plane.
        columns: columns of windows in one block of channels.
        programs: programs in the whole grid.
        rows_per_program: rows of windows that a program processes.
    """

    tile: Tile
    columns: int
    programs: int
    rows_per_program: int


def has_pool_kernel(shape: tuple[int, ...], contiguous: bool, itemsize: int) -> bool:
    """Whether `bn_max_pool` accepts tensors of this shape, memory format and item size.

    Tensors must not be fp64 and must have fewer than 2^31 − 2^24 elements. Each row of a contiguous
    tensor must be a multiple of 32 bytes.
    """
    # A column of a plane is a vector of windows, which covers two vectors of x.
    whole_vectors = not contiguous or shape[3] % (2 * VECTOR_BYTES // itemsize) == 0
    return itemsize < 8 and prod(shape) < NARROW_LIMIT and whole_vectors


def column_config(
    kernel: str, shape: tuple[int, ...], contiguous: bool, itemsize: int, rows: int, sm_count: int
) -> ColumnConfig:
    """Splits the ``rows`` of windows over programs so that the kernel ends as early as possible.

    A turn is ``programs_per_sm * sm_count`` programs. A program reads one row more than it
    processes. The split minimises the number of turns, rounded up, times the rows that a program
    reads.
    """
    n, channels, *size = shape
    _, width = pooled_size(*size)
    if contiguous:
        # Each column is a vector, and a program's vectors may belong to different channels.
        tile = tile_for(ChannelView(1, 1, VECTOR_BYTES // itemsize), itemsize)
        columns, col_blocks = n * channels * (width // tile.vector), 1
    else:
        columns = n * width
        tile = tile_for(ChannelView(columns, channels, 1), itemsize)
        col_blocks = -(-channels // tile.block_channels)
    blocks = -(-columns // tile.sub_rows) * col_blocks
    programs = TUNING[kernel].programs_per_sm * sm_count

    def longest_walk(splits: int) -> int:
        return -(-blocks * splits // programs) * (-(-rows // splits) + 1)

    rows_per_program = -(-rows // min(range(1, rows + 1), key=longest_walk))
    return ColumnConfig(tile, columns, blocks * -(-rows // rows_per_program), rows_per_program)
