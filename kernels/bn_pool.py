"""Batch norm, activation and max-pool in one pass, without writing what is pooled.

Forward keeps, of each window, where its greatest value lies and the x there; the reduce pass of
backward is then `bn_backward.bn_backward_reduce` over these. The kernels here take every window;
`bn_pool_3x3` has faster ones for the most common one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.bn_pool_3x3 import _bn_max_pool_3x3_bwd_dx_kernel, _bn_max_pool_3x3_kernel
from bnres.kernels.channels import load_biases, load_mean_grads, load_norm
from bnres.kernels.config import VECTOR_BYTES
from bnres.kernels.device import ACTIVATIONS, round_to
from bnres.kernels.launch import launch, plan, plan_columns
from bnres.kernels.norm import Norm, Sums
from bnres.kernels.outputs import empty_pooled
from bnres.kernels.tiles import CHANNELS, split_rows
from bnres.kernels.window import Window

# More taps, or more windows that cover a position, are visited in a loop that is not unrolled.
UNROLLED_TAPS = tl.constexpr(16)


@triton.jit
def _positions(
    row, col_block, count, C, H, W, TILE: tl.constexpr, UNROLL: tl.constexpr, INDEX: tl.constexpr
):
    """Sample (channels_last) or plane, height, width and channel of a tile's elements; its mask."""
    local = tl.arange(0, UNROLL * TILE.sub_rows)[:, None]
    cols = tl.arange(0, TILE.block_cols)[None, :]
    if TILE.kind == CHANNELS:
        position = tl.cast(row, INDEX) + local
        channel = col_block * TILE.block_cols + cols
        mask = position < count
        if not TILE.even:
            mask = mask & (channel < C)
    else:
        position = (tl.cast(row, INDEX) + local) * TILE.vector + cols
        channel = position // (H * W) % C
        mask = position < count
    n = position // (H * W)
    rest = position - n * (H * W)
    h = rest // W
    return n, h, rest - h * W, channel, mask


@triton.jit
def _offsets(n, h, w, channel, C, H, W, TILE: tl.constexpr):
    """Where elements lie in a tensor of height H and width W."""
    position = (n * H + h) * W + w
    if TILE.kind == CHANNELS:
        stride = C
        if TILE.aligned:
            stride = (C // TILE.vector) * TILE.vector
        position = position * stride + channel
    return position


@triton.jit
def _load_norm(
    mean_ptr, rstd_ptr, var_ptr, weight_ptr, bias_ptr, channel, C, eps, ACC: tl.constexpr
):  # fmt: skip
    """mean, rstd, rstd·weight and bias of channels."""
    mask = channel < C
    mean, rstd, scale = load_norm(mean_ptr, rstd_ptr, var_ptr, weight_ptr, eps, channel, mask, ACC)
    return mean, rstd, scale, load_biases(bias_ptr, None, channel, mask, ACC)


@triton.jit
def _visit_tap(
    best, argmax, x_max,
    x_ptr,
    n, oh, ow, kh, kw, channel, mask, C, H, W, mean, scale, bias, param,
    ACT: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Takes in one position of the windows: the first greatest value stays, NaN takes over."""
    h = oh * WINDOW.stride_h - WINDOW.padding_h + kh * WINDOW.dilation_h
    w = ow * WINDOW.stride_w - WINDOW.padding_w + kw * WINDOW.dilation_w
    inside = mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x = tl.load(x_ptr + _offsets(n, h, w, channel, C, H, W, TILE), mask=inside, other=0)
    y = ACT((x.to(ACC) - mean) * scale + bias, param)
    y = round_to(y, x_ptr.dtype.element_ty).to(ACC)
    takes = inside & ((argmax < 0) | (y > best) | (y != y))
    best = tl.where(takes, y, best)
    x_max = tl.where(takes, x, x_max)
    return best, tl.where(takes, kh * WINDOW.kernel_w + kw, argmax), x_max


@triton.jit
def _bn_max_pool_kernel(
    y_ptr, argmax_ptr, x_max_ptr, x_ptr,
    mean_ptr, rstd_ptr, var_ptr, weight_ptr, bias_ptr,
    count, C, H, W, OH, OW, rows_per_split, act_param: tl.float64, eps: tl.float64,
    ACT: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = max over each window of act(bn(x)), rounded; its position in the window, and x there."""
    col_block, split = tl.program_id(0), tl.program_id(1)
    if TILE.kind == CHANNELS:
        channel = col_block * TILE.block_cols + tl.arange(0, TILE.block_cols)[None, :]
        mean, _, scale, bias = _load_norm(
            mean_ptr, rstd_ptr, var_ptr, weight_ptr, bias_ptr, channel, C, eps, ACC
        )
    param = tl.full((), act_param, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    for row in tl.range(start, stop, UNROLL * TILE.sub_rows, num_stages=STAGES):
        n, oh, ow, channel, mask = _positions(row, col_block, count, C, OH, OW, TILE, UNROLL, INDEX)
        if TILE.kind != CHANNELS:
            mean, _, scale, bias = _load_norm(
                mean_ptr, rstd_ptr, var_ptr, weight_ptr, bias_ptr, channel, C, eps, ACC
            )
        best = tl.full((UNROLL * TILE.sub_rows, TILE.block_cols), 0.0, ACC)
        argmax = tl.full((UNROLL * TILE.sub_rows, TILE.block_cols), -1, tl.int32)
        x_max = tl.full((UNROLL * TILE.sub_rows, TILE.block_cols), 0.0, x_ptr.dtype.element_ty)
        TAPS: tl.constexpr = WINDOW.taps
        if TAPS <= UNROLLED_TAPS:
            for tap in tl.static_range(TAPS):
                best, argmax, x_max = _visit_tap(
                    best, argmax, x_max, x_ptr, n, oh, ow, tap // WINDOW.kernel_w,
                    tap % WINDOW.kernel_w, channel, mask, C, H, W, mean, scale, bias, param, ACT,
                    WINDOW, TILE, ACC,
                )  # fmt: skip
        else:
            for tap in tl.range(0, TAPS):
                best, argmax, x_max = _visit_tap(
                    best, argmax, x_max, x_ptr, n, oh, ow, tap // WINDOW.kernel_w,
                    tap % WINDOW.kernel_w, channel, mask, C, H, W, mean, scale, bias, param, ACT,
                    WINDOW, TILE, ACC,
                )  # fmt: skip
        offsets = _offsets(n, oh, ow, channel, C, OH, OW, TILE)
        tl.store(y_ptr + offsets, round_to(best, y_ptr.dtype.element_ty), mask=mask)
        if argmax_ptr is not None:
            tl.store(argmax_ptr + offsets, argmax.to(argmax_ptr.dtype.element_ty), mask=mask)
            tl.store(x_max_ptr + offsets, x_max, mask=mask)


@triton.jit
def _window_grad(
    dy_ptr, argmax_ptr,
    window, n, h, w, channel, mask, C, OH, OW,
    WINDOW: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The dy of one of the windows that cover a position, where it is that window's greatest; else 0."""
    oh = (h + WINDOW.padding_h) // WINDOW.stride_h - window // WINDOW.covering_w
    ow = (w + WINDOW.padding_w) // WINDOW.stride_w - window % WINDOW.covering_w
    down = h + WINDOW.padding_h - oh * WINDOW.stride_h
    across = w + WINDOW.padding_w - ow * WINDOW.stride_w
    kh, kw = down // WINDOW.dilation_h, across // WINDOW.dilation_w
    covers = mask & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
    covers = covers & (kh < WINDOW.kernel_h) & (kw < WINDOW.kernel_w)
    if WINDOW.dilation_h > 1 or WINDOW.dilation_w > 1:
        covers = covers & (kh * WINDOW.dilation_h == down)
        covers = covers & (kw * WINDOW.dilation_w == across)
    at = _offsets(n, oh, ow, channel, C, OH, OW, TILE)
    argmax = tl.load(argmax_ptr + at, mask=covers, other=0).to(tl.int32)
    dy = tl.load(dy_ptr + at, mask=covers, other=0).to(ACC)
    return tl.where(covers & (argmax == kh * WINDOW.kernel_w + kw), dy, 0.0)


@triton.jit
def _bn_max_pool_bwd_dx_kernel(
    dx_ptr, dy_ptr, argmax_ptr, x_ptr,
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    sum_dy_ptr, sum_dy_xhat_ptr,
    count, C, H, W, OH, OW, rows_per_split, act_param: tl.float64, stats_count,
    ACT_GRAD: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx as in `_bn_bwd_dx_kernel`, dz = act'(z)·(the dy of all windows whose greatest this is)."""
    col_block, split = tl.program_id(0), tl.program_id(1)
    if TILE.kind == CHANNELS:
        channel = col_block * TILE.block_cols + tl.arange(0, TILE.block_cols)[None, :]
        mean, rstd, scale, bias = _load_norm(
            mean_ptr, rstd_ptr, None, weight_ptr, bias_ptr, channel, C, 0.0, ACC
        )
        if sum_dy_ptr is not None:
            mean_dy, slope = load_mean_grads(
                sum_dy_ptr, sum_dy_xhat_ptr, rstd, stats_count, channel, channel < C, ACC
            )
    param = tl.full((), act_param, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    for row in tl.range(start, stop, UNROLL * TILE.sub_rows, num_stages=STAGES):
        n, h, w, channel, mask = _positions(row, col_block, count, C, H, W, TILE, UNROLL, INDEX)
        if TILE.kind != CHANNELS:
            mean, rstd, scale, bias = _load_norm(
                mean_ptr, rstd_ptr, None, weight_ptr, bias_ptr, channel, C, 0.0, ACC
            )
            if sum_dy_ptr is not None:
                mean_dy, slope = load_mean_grads(
                    sum_dy_ptr, sum_dy_xhat_ptr, rstd, stats_count, channel, channel < C, ACC
                )
        offsets = _offsets(n, h, w, channel, C, H, W, TILE)
        x_centred = tl.load(x_ptr + offsets, mask=mask, other=0).to(ACC) - mean
        dy = tl.full((UNROLL * TILE.sub_rows, TILE.block_cols), 0.0, ACC)
        COVERING: tl.constexpr = WINDOW.covering_h * WINDOW.covering_w
        if COVERING <= UNROLLED_TAPS:
            for window in tl.static_range(COVERING):
                dy += _window_grad(
                    dy_ptr, argmax_ptr, window, n, h, w, channel, mask, C, OH, OW, WINDOW, TILE, ACC
                )
        else:
            for window in tl.range(0, COVERING):
                dy += _window_grad(
                    dy_ptr, argmax_ptr, window, n, h, w, channel, mask, C, OH, OW, WINDOW, TILE, ACC
                )
        dx = ACT_GRAD(dy, x_centred * scale + bias, param)
        if sum_dy_ptr is not None:
            dx = dx - mean_dy - x_centred * slope
        tl.store(dx_ptr + offsets, round_to(dx * scale, dx_ptr.dtype.element_ty), mask=mask)


def _sizes(x: Tensor, pooled: Tensor) -> dict[str, int]:
    """The kernels' arguments for the shapes of both tensors."""
    channels, height, width = x.shape[1:]
    return {
        "C": channels,
        "H": height,
        "W": width,
        "OH": pooled.shape[2],
        "OW": pooled.shape[3],
    }


def _index(x: Tensor, pooled: Tensor) -> tl.dtype:
    """The type of offsets in both tensors."""
    return tl.int32 if max(x.numel(), pooled.numel()) < 2**31 - 2**20 else tl.int64


def is_3x3(x: Tensor, pooled: Tensor, window: Window) -> bool:
    """Whether the kernels of `bn_pool_3x3` take this pooling."""
    height, width = x.shape[2:]
    return (
        window == Window(3, 3, 2, 2, 1, 1, 1, 1)
        # With ceil_mode there may be a last window whose middle is outside.
        and pooled.shape[2:] == ((height + 1) // 2, (width + 1) // 2)
        and x.dtype != torch.float64
        and _index(x, pooled) == tl.int32
        # A column of a plane is a vector of windows, which begin at two vectors of x.
        and not (x.is_contiguous() and width % (2 * VECTOR_BYTES // x.itemsize))
    )


def bn_max_pool(
    x: Tensor,
    norm: Norm,
    act: str,
    act_param: float,
    window: Window,
    ceil_mode: bool,
    *,
    save: bool = False,
    out: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """max_pool2d(act(norm(x))) of a dense 4-D ``x``, in its memory format.

    If asked, also each greatest value's position in its window, row by row (uint8, or int32 for
    windows of more than 256), and the x there. Ties, NaN and padding are as in
    `torch.nn.functional.max_pool2d`. ``out`` are these three, allocated by the caller.
    """
    y, argmax, x_max = out or (empty_pooled(x, window, ceil_mode), None, None)
    if save and out is None:
        argmax, x_max = torch.empty_like(y, dtype=window.argmax_dtype), torch.empty_like(y)
    if y.numel() == 0:
        return y, argmax, x_max
    contiguous = x.is_contiguous()
    arguments = {
        "y_ptr": y,
        "argmax_ptr": argmax,
        "x_max_ptr": x_max,
        "x_ptr": x,
        **norm.pointers(),
        **_sizes(x, y),
        "act_param": act_param,
        "ACT": ACTIVATIONS[act].forward,
    }
    if is_3x3(x, y, window):
        how = plan_columns("pool_3x3", y, contiguous, rows=y.shape[2])
        launch(_bn_max_pool_3x3_kernel, how, **arguments)
    else:
        how = plan("pool", y, contiguous)
        launch(_bn_max_pool_kernel, how, **arguments, WINDOW=window, INDEX=_index(x, y))
    return y, argmax, x_max


def bn_max_pool_backward_dx(
    dy: Tensor,
    argmax: Tensor,
    x: Tensor,
    norm: Norm,
    act: str,
    act_param: float,
    window: Window,
    sums: Sums | None,
    count: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """dx; ``dy`` (of what was pooled) and ``argmax`` are stored in memory as ``x`` is.

    ``sums`` are Σ dz and Σ dz·xhat of each channel, over ``count`` elements; None stands for eval
    mode, where the statistics are constants.
    """
    dx = torch.empty_like(x) if out is None else out
    if x.numel() == 0:
        return dx
    arguments = {
        "dx_ptr": dx,
        "dy_ptr": dy,
        "argmax_ptr": argmax,
        "x_ptr": x,
        **norm.pointers(),
        "sum_dy_ptr": None if sums is None else sums.dy,
        "sum_dy_xhat_ptr": None if sums is None else sums.dy_xhat,
        **_sizes(x, dy),
        "act_param": act_param,
        "stats_count": count,
        "ACT_GRAD": ACTIVATIONS[act].grad,
    }
    if is_3x3(x, dy, window):
        how = plan_columns("pool_3x3_dx", dy, x.is_contiguous(), rows=dy.shape[2] + 1)
        launch(_bn_max_pool_3x3_bwd_dx_kernel, how, **arguments)
    else:
        how = plan("pool_dx", x)
        launch(_bn_max_pool_bwd_dx_kernel, how, **arguments, WINDOW=window, INDEX=_index(x, dy))
    return dx
