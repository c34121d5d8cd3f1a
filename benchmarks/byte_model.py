"""The least that a fused operation moves, in S: the bytes of one activation tensor.

Forward reads its inputs twice (statistics, then apply) and writes its output; backward likewise.
An addition in front of the ReLU keeps one bit of sign an element. Nothing is taken to stay in the L2
cache between the two: a small tensor does, and its time can be less than its bytes would have it. ``benchmarks.audit`` counts what
our kernels do move; every provider's bandwidth is reckoned with these same bytes, so that shares
compare as times do.
"""

from benchmarks.sites import ConvSite

# Operation, direction -> (passes of whole tensors, one-bit tensors).
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
    # Pooled 3×3 with stride 2: an output is S/4, a position S/8 in 16 bits, x at it S/4.
    ("bn_relu_pool", "forward"): (2.5, 2),
    ("bn_relu_pool", "backward"): (2.75, 2),
    ("bn_relu_pool", "eval"): (1.25, 0),
    ("bn_relu_pool_fork", "backward"): (3.25, 2),
}


def passes(operation: str, direction: str, itemsize: int) -> float:
    """Passes over memory, in S."""
    whole, bits = PASSES[operation, direction]
    return whole + bits / (8 * itemsize)


def moved_bytes(operation: str, direction: str, elements: int, itemsize: int) -> int:
    """Bytes an operation of a batch norm's site moves at least."""
    return round(passes(operation, direction, itemsize) * elements * itemsize)


def conv_bytes_and_flops(site: ConvSite, batch: int, itemsize: int) -> tuple[int, int]:
    """Bytes that a convolution moves at least, and its floating-point operations."""
    n, k, height, width = site.output_shape(batch)
    outputs = n * k * height * width
    inputs = batch * site.channels * site.size**2
    filters = k * site.channels * site.window.taps
    bytes_moved = (inputs + filters + outputs * (1 + site.has_residual)) * itemsize
    return bytes_moved, 2 * outputs * site.channels * site.window.taps
