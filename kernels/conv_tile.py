"""A tile of a convolution as a product of matrices over channels_last, for the kernels that end it.

Rows are positions of the output, columns its channels; what is summed are the filter's taps and the
input's channels.
"""

import triton
import triton.language as tl


@triton.jit
def conv_tile(
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
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """conv(x) of this program's tile in fp32, its positions and its channels.

    With few channels (ROW_CHANNELS, else 0) a whole row of the filter is summed at once: its
    kernel_w·C elements of x lie one behind the other.
    """
    blocks_n = tl.cdiv(K_OUT, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    stride_c = C
    if ALIGNED_IN > 1:
        stride_c = (C // ALIGNED_IN) * ALIGNED_IN
    if ROW_CHANNELS > 0:
        stride_c = ROW_CHANNELS
    offs_m = tl.cast(pid_m, INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.cast(pid_n, INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < K_OUT
    n = offs_m // (OH * OW)
    rest = offs_m - n * (OH * OW)
    oh = rest // OW
    h0 = oh * SHAPE.stride_h - SHAPE.padding_h
    w0 = (rest - oh * OW) * SHAPE.stride_w - SHAPE.padding_w
    x_rows = ((n * H + h0) * W + w0) * stride_c
    filter_rows = offs_n * (stride_c * SHAPE.taps)
    depth, steps = stride_c, SHAPE.taps
    if ROW_CHANNELS > 0:
        depth, steps = stride_c * SHAPE.kernel_w, SHAPE.kernel_h
    blocks_k = tl.cdiv(depth, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, steps * blocks_k):
        tap = step // blocks_k
        k = (step - tap * blocks_k) * BLOCK_K
        if ROW_CHANNELS > 0:
            h = h0 + tap * SHAPE.dilation_h
            w = w0[:, None] + ((k + offs_k) // ROW_CHANNELS)[None, :]
            mask_x = (mask_m & (h >= 0) & (h < H))[:, None] & (w >= 0) & (w < W)
            shift = tap * SHAPE.dilation_h * W * stride_c
        else:
            r = tap // SHAPE.kernel_w
            s = tap - r * SHAPE.kernel_w
            h = h0 + r * SHAPE.dilation_h
            w = w0 + s * SHAPE.dilation_w
            mask_x = (mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            shift = (r * SHAPE.dilation_h * W + s * SHAPE.dilation_w) * stride_c
        mask_filter = mask_n[None, :]
        if not EVEN_K:
            mask_x = mask_x & (k + offs_k < depth)[None, :]
            mask_filter = mask_filter & (k + offs_k < depth)[:, None]
        x = tl.load(x_ptr + ((x_rows + shift + k)[:, None] + offs_k[None, :]), mask=mask_x, other=0)
        filter = tl.load(
            filter_ptr + ((filter_rows + (tap * depth + k))[None, :] + offs_k[:, None]),
            mask=mask_filter,
            other=0,
        )
        acc = tl.dot(x, filter, acc, input_precision=PRECISION)
    return acc, offs_m, offs_n
