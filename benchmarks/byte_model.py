"""The fewest bytes that a fused operation can move, in units of S.

S is the size of one activation tensor in bytes. In training, forward and backward read their inputs
twice, once for the sums of each channel and once for the result. If an operation adds a residual
that has no batch norm, its forward also stores one bit for each element, which says whether the
input of the ReLU is positive. The backward reads these bits.

The model assumes that no read finds its data in the L2 cache. A small tensor does stay in the
cache, so an operation on it can be faster than the model allows.

The benchmarks report the bytes of this model, divided by the measured time, as the bandwidth of an
implementation, even if it moves more bytes. ``benchmarks.audit`` counts the bytes that our kernels
actually move.
"""

from benchmarks.sites import ConvSite

# For each (operation, direction): the bytes that are read and written, in units of S, and the bits
# per element of the activation that are read and written in addition.
PASSES = {
    ("bn", "forward"): (3, 0),
    ("bn", "backward"): (5, 0),
    ("bn", "eval"): (2, 0),
    ("bn_relu", "forward"): (3, 0),
    ("bn_relu", "backward"): (5, 0),
    ("bn_relu", "eval"): (2, 0),
    ("bn_add_relu", "forward"): (4, 1),
    ("bn_add_relu", "backward"): (6, 1),
    ("bn_add_relu", "eval"): (3, 0),
    ("bn_add_relu_fork", "backward"): (7, 1),
    ("dual_bn_add_relu", "forward"): (5, 0),
    ("dual_bn_add_relu", "backward"): (8, 0),
    ("dual_bn_add_relu", "eval"): (3, 0),
    ("dual_bn_add_relu_fork", "backward"): (10, 0),
    # A 3×3 max-pool with stride 2 has an output of S/4 bytes. The forward in training also stores,
    # for the backward, the input's values at the maxima (S/4 bytes) and the positions of the maxima
    # (one byte per element of the output, which is 2 bits per element of the input).
    ("bn_relu_pool", "forward"): (2.5, 2),
    ("bn_relu_pool", "backward"): (2.75, 2),
    ("bn_relu_pool", "eval"): (1.25, 0),
    ("bn_relu_pool_fork", "backward"): (3.25, 2),
}


def passes(operation: str, direction: str, itemsize: int) -> float:
    """Returns the fewest bytes that an operation can move, in units of S.

    Args:
        operation: name of the operation, such as ``bn_relu``.
        direction: ``forward``, ``backward`` or ``eval``.
        itemsize: bytes of an element of the activation.
    """
    whole, bits = PASSES[operation, direction]
    return whole + bits / (8 * itemsize)


def moved_bytes(operation: str, direction: str, elements: int, itemsize: int) -> int:
    """Returns the fewest bytes that an operation on ``elements`` elements can move."""
    return round(passes(operation, direction, itemsize) * elements * itemsize)


def conv_bytes_and_flops(site: ConvSite, batch: int, itemsize: int) -> tuple[int, int]:
    """Returns the fewest bytes that a convolution can move, and the number of its FLOPs."""
    n, k, height, width = site.output_shape(batch)
    outputs = n * k * height * width
    inputs = batch * site.channels * site.size**2
    filters = k * site.channels * site.window.taps
    bytes_moved = (inputs + filters + outputs * (1 + site.has_residual)) * itemsize
    return bytes_moved, 2 * outputs * site.channels * site.window.taps
