"""The fewest bytes that a fused operation can move, in units of S.

S is the size of one activation tensor in bytes. A forward in training reads the input of a batch
norm twice, once for the statistics and once for the output, and writes the output. A backward also
passes twice over memory, once for the sums of each channel and once for the gradients. If an
operation adds a residual that has no batch norm, its forward also stores one bit for each element,
which is the sign of the input of the ReLU. Its backward reads these bits.

The model assumes that nothing stays in the L2 cache between the two passes. A small tensor does
stay in the cache, so an operation on a small tensor can be faster than this model allows.

``benchmarks.audit`` counts the bytes that our kernels actually move. Benchmarks compute the
bandwidth of every implementation from the bytes of this model, so the ratio of two bandwidths is
the inverse ratio of the times.
"""

from benchmarks.sites import ConvSite

# The keys are (operation, direction). A value has two numbers: how many times S is read or written,
# and how many additional bits are read or written for each element of an activation.
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
    # These numbers are for 3×3 pooling with stride 2 of a 16-bit activation. The output has S/4
    # bytes. For backward, the forward also stores the positions of the maxima in S/8 bytes, and the
    # values of x at these positions in S/4 bytes.
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
