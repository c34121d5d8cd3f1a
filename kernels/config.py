"""Computes tile geometry and launch configurations from a tensor's shape.

A program processes a block of columns over a range of rows, one tile after another. There are three
kinds of tiles, in which rows and columns mean different things. A plane is one channel of a sample.
A vector has 16 bytes.

==========  ======================  =========================  ======================
kind        used for                a row is                   a column is
==========  ======================  =========================  ======================
`CHANNELS`  channels_last           one position of a sample   one channel
`PLANES`    contiguous              one vector of one channel  one element of a vector
`GROUPS`    contiguous with small   one sample                 one element of a group
            planes that are not                                of adjacent channels
            whole vectors (7×7)
==========  ======================  =========================  ======================

The geometry of tiles is derived from byte counts and from code compiled for sm_90. The values of
`TUNING` were measured on an H200, at the tensor sizes of ResNet-18 in bfloat16. Section 8 of
`benchmarks/NOTES.md` explains them. `python -m benchmarks variants` times alternatives.
"""

from dataclasses import dataclass
from math import gcd, prod

from bnres.kernels.layout import ChannelView, pooled_size

CHANNELS, PLANES, GROUPS = 0, 1, 2

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
VECTOR_BYTES = 16
# Offsets have 32 bits if a tensor's tiles have fewer elements than this. Elements of the last tiles
# that are beyond the tensor's end count too.
NARROW_LIMIT = 2**31 - 2**24
# The format of the activation's mask (one bit per element) depends on this unroll factor, so all
# kernels that read or write the mask must use it.
MASK_UNROLL = 4


@dataclass(frozen=True)
class Tile:
    """Geometry of a tile, known at compile time.

    Forward and backward use the same geometry, because it depends only on a tensor's shape, memory
    format and dtype. A *sub-tile* has ``sub_rows × block_cols`` elements, one 16-byte vector for
    each of the program's 128 threads.

    Attributes:
        kind: `CHANNELS`, `PLANES` or `GROUPS`.
        sub_rows: rows of a sub-tile, a power of two.
        block_cols: columns of a tile, a power of two.
        block_channels: channels in a column block.
        group_inner: number of elements of a plane in a `GROUPS` tile, 0 for the other kinds.
        vector: number of elements of a 16-byte vector.
        aligned: whether every row starts at a multiple of the vector size.
        even: whether no column needs a mask.
        narrow: whether offsets have 32 bits instead of 64.
        words: whether two bfloat16 values are loaded as one 32-bit word.
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
        """The number of columns that a `GROUPS` tile uses, at most ``block_cols``."""
        return self.block_channels * self.group_inner

    @property
    def inner_pow2(self) -> int:
        return next_power_of_2(self.group_inner)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def channels_per_group(view: ChannelView, vector: int) -> int:
    """Returns the number of channels in a `GROUPS` tile, or 0 if no number fits.

    The number must divide the number of all channels. In one sample, the planes of these channels
    must fill whole vectors, at most one vector per thread.
    """
    size = vector // gcd(view.inner, vector)
    limit = THREADS * vector
    if view.channels % size or size * view.inner > limit:
        return 0
    while view.channels % (2 * size) == 0 and 2 * size * view.inner <= limit:
        size *= 2
    return size


def tile_for(view: ChannelView, itemsize: int) -> Tile:
    """Returns the tile geometry for a tensor with ``itemsize`` bytes per element."""
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
        # The second term is one tile per channel, because the mask has bytes for the whole of a
        # channel's last tile, even if most of that tile is empty.
        narrow=view.numel + view.channels * MASK_UNROLL * THREADS * vector < NARROW_LIMIT,
        words=False,
    )


def tile_rows(view: ChannelView, tile: Tile) -> int:
    """Returns the number of rows that the whole tensor has in one column block."""
    return -(-view.count // tile.vector) if tile.kind == PLANES else view.outer


@dataclass(frozen=True)
class KernelTuning:
    """Launch parameters of a kernel.

    Attributes:
        unroll: number of sub-tiles in a tile.
        num_stages: number of stages of the software pipeline, 1 for no pipeline.
        programs_per_sm: number of programs in the grid for each multiprocessor.
    """

    unroll: int
    num_stages: int
    programs_per_sm: int


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched over a tensor.

    Attributes:
        col_blocks: number of column blocks, and size of the grid's first axis.
        splits: number of programs among which the rows of one column block are divided, and size of
            the grid's second axis. Each program computes one split.
        rows_per_split: number of rows in a split, a multiple of ``unroll * sub_rows``.
    """

    col_blocks: int
    splits: int
    rows_per_split: int


# `launch_config` explains this factor.
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
    """Splits the rows so that all multiprocessors have work, whatever the number of channels.

    Normally the grid has at most ``programs_per_sm * sm_count`` programs. There are two exceptions:

    - If each of these programs had fewer than 1.5 tiles, each tile gets its own program, so that
      more loads run at the same time.
    - If there are more column blocks than ``programs_per_sm * sm_count``, the grid has about
      ``TURNS * programs_per_sm * sm_count`` programs, so that all multiprocessors finish at about
      the same time.
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
    """How a kernel over pooling windows is launched.

    Attributes:
        tile: the tile's geometry. In channels_last, a row of the tile is one output column of a
            sample. In contiguous tensors, a row of the tile is a vector of adjacent output columns
            of one channel of a sample.
        columns: number of these rows in one block of channels.
        programs: number of programs in the whole grid.
        rows_per_program: number of rows of windows that a program processes.
    """

    tile: Tile
    columns: int
    programs: int
    rows_per_program: int


def has_pool_kernel(shape: tuple[int, ...], contiguous: bool, itemsize: int) -> bool:
    """Whether `bn_max_pool` accepts tensors of this shape, memory format and item size.

    Tensors must not be fp64 and must have fewer than 2^31 − 2^24 elements. In a contiguous tensor,
    the size of each row in bytes must be a multiple of 32.
    """
    # A contiguous tensor is processed in vectors of adjacent windows. Because the stride is 2, a
    # vector of windows covers two vectors in a row of x.
    whole_vectors = not contiguous or shape[3] % (2 * VECTOR_BYTES // itemsize) == 0
    return itemsize < 8 and prod(shape) < NARROW_LIMIT and whole_vectors


def column_config(
    kernel: str, shape: tuple[int, ...], contiguous: bool, itemsize: int, rows: int, sm_count: int
) -> ColumnConfig:
    """Divides the ``rows`` of windows among programs so that the kernel ends as early as possible.

    At most ``programs_per_sm * sm_count`` programs run at once, so the grid runs in rounds. Each
    program reads one row more than it processes. The division minimises the number of rounds times
    the number of rows that a program reads.
    """
    n, channels, *size = shape
    _, width = pooled_size(*size)
    if contiguous:
        # A program's vectors may belong to different channels.
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
