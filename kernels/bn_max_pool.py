"""Batch norm, activation and 3×3 max-pooling with stride 2 and padding 1, as in a ResNet's stem.

The activation's output is pooled without being written to memory. Forward stores each maximum's
position in its window, and x_max, the value of x at this position. In backward, the gradient dz of
the activation's input is 0 except at the maxima. To compute Σ dz and Σ dz·xhat,
`bn_backward.bn_backward_reduce` therefore reads x_max instead of x.

A program processes a block of columns of pooling windows. It computes the columns' positions before
it loops over the rows of windows, so the loop contains no division. Neighbouring rows of windows
overlap in one row of x, which forward normalises only once. A window position outside x is replaced
by its neighbour inside x, which is in the same window, so the maximum doesn't change.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.channels import load_biases, load_line, load_norm
from bnres.kernels.device import ACTIVATIONS, INTERPRETED, round_to
from bnres.kernels.launch import launch, plan_columns
from bnres.kernels.norm import Norm, Sums
from bnres.kernels.outputs import empty_pooled
from bnres.kernels.tiles import CHANNELS


@triton.jit
def _program(C, OH, rows_per_program, TILE: tl.constexpr):
    """Returns a program's block of channels, block of columns, first row, and row after the last.

    Rows and columns are those of the pooling windows.
    """
    col_blocks = 1
    if TILE.kind == CHANNELS:
        col_blocks = tl.cdiv(C, TILE.block_cols)
    strips = tl.cdiv(OH, rows_per_program)
    rest = tl.program_id(0) // col_blocks
    start = rest % strips * rows_per_program
    stop = tl.minimum(start + rows_per_program, OH)
    return tl.program_id(0) % col_blocks, rest // strips, start, stop


@triton.jit
def _sizes(C, W, OW, TILE: tl.constexpr):
    """Returns the step, W and OW.

    The step is the distance between neighbouring positions of a row, in elements. Multiples of the
    vector size are written as products with the vector size, so that the compiler uses aligned
    loads.
    """
    step = 1
    if TILE.kind == CHANNELS:
        step = C
        if TILE.aligned:
            step = (C // TILE.vector) * TILE.vector
    else:
        OW = (OW // TILE.vector) * TILE.vector
        W = 2 * OW
    return step, W, OW


@triton.jit
def _columns(col_block, block, columns, C, OW, TILE: tl.constexpr):
    """Returns plane, ow, exists, offsets and channel for the elements of a tile.

    In channels_last, a row of the tile is one output column of a sample. Then plane is the sample's
    index, ow is the output column, and the offsets are channels.

    In contiguous tensors, a row of the tile is a vector of adjacent output columns of one channel.
    Then plane is sample·C + channel, ow is the vector's first output column, and the offsets are
    positions in the vector.
    """
    column = block * TILE.sub_rows + tl.arange(0, TILE.sub_rows)[:, None]
    exists = column < columns
    local = tl.arange(0, TILE.block_cols)[None, :]
    if TILE.kind == CHANNELS:
        plane = column // OW
        ow = column - plane * OW
        local += col_block * TILE.block_cols
        channel = local
        if not TILE.even:
            exists = exists & (channel < C)
    else:
        vectors = OW // TILE.vector
        plane = column // vectors
        ow = (column - plane * vectors) * TILE.vector
        channel = plane % C
    return plane, ow, exists, local, channel


@triton.jit
def _load_two(ptr, step, at, exists, has_right, TILE: tl.constexpr):
    """Loads the values at two neighbouring positions of each window.

    In contiguous tensors, the first result has the values at the even positions of two adjacent
    vectors, and the second result has the values at the odd positions.
    """
    if TILE.kind == CHANNELS:
        return tl.load(ptr + at, mask=exists), tl.load(ptr + step + at, mask=has_right)
    else:
        # Two loads give each thread both vectors. A single load would give each thread one vector
        # of 16 bytes, so the two vectors would be in different threads.
        v = tl.join(tl.load(ptr + at, mask=exists), tl.load(ptr + TILE.vector + at, mask=exists))
        return tl.split(tl.reshape(tl.permute(v, (0, 2, 1)), (TILE.sub_rows, TILE.vector, 2)))


@triton.jit
def _store_two(ptr, step, at, v, v_right, exists, has_right, TILE: tl.constexpr):
    """Stores ``v`` and ``v_right`` at the positions that `_load_two` loads."""
    if TILE.kind == CHANNELS:
        tl.store(ptr + at, v, mask=exists)
        tl.store(ptr + step + at, v_right, mask=has_right)
    else:
        v = tl.reshape(tl.interleave(v, v_right), (TILE.sub_rows, 2, TILE.vector))
        first, second = tl.split(tl.permute(v, (0, 2, 1)))
        tl.store(ptr + at, first, mask=exists)
        tl.store(ptr + TILE.vector + at, second, mask=exists)


@triton.jit
def _after(first, v):
    """Returns ``first`` followed by all columns of ``v`` except the last.

    The function compiles to no instructions: it only renames a thread's registers.
    """
    if v.shape[1] == 1:
        return first
    else:
        even, odd = tl.split(tl.reshape(v, (v.shape[0], v.shape[1] // 2, 2)))
        return tl.interleave(_after(first, odd), even)


@triton.jit
def _before(v, last):
    """Returns all columns of ``v`` except the first, followed by ``last``.

    The function compiles to no instructions.
    """
    if v.shape[1] == 1:
        return last
    else:
        even, odd = tl.split(tl.reshape(v, (v.shape[0], v.shape[1] // 2, 2)))
        return tl.interleave(odd, _before(even, last))


@triton.jit
def _widened(x):
    """Returns ``x`` in fp32.

    A bfloat16 is shifted left as in `_tagged`, so the compiler needs one shift for both functions.
    """
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _tagged(x, tap):
    """Packs x and its position ``tap`` in the window into one integer.

    One select instruction can then choose both.
    """
    if x.dtype.primitive_bitwidth == 16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16) | tap
    else:
        return (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | tap


@triton.jit
def _untagged(tagged, DTYPE: tl.constexpr):
    """Returns the x and the position that `_tagged` packed."""
    if DTYPE.primitive_bitwidth == 16:
        x = (tagged >> 16).to(tl.int16)
    else:
        x = (tagged >> 32).to(tl.int32)
    return x.to(DTYPE, bitcast=True), (tagged & 15).to(tl.uint8)


@triton.jit
def _greater(best, tagged, y, y_tagged):
    """Returns the greater of ``best`` and ``y``, and the greater one's result of `_tagged`.

    ``y`` is from a later position of the window than ``best``. If they are equal, ``best`` is
    chosen. NaN counts as the greatest value. If both are NaN, ``y`` is chosen.
    """
    # tl.minimum(NaN, inf) is inf, so if ``best`` is NaN, only another NaN replaces it.
    stays = y <= tl.minimum(best, float("inf"))
    tagged = tl.where(stays, tagged, y_tagged)
    return tl.maximum(best, y, propagate_nan=tl.PropagateNan.ALL), tagged


@triton.jit
def _value(x, mean, scale, bias, param, ACT: tl.constexpr):
    """Returns act((x − mean)·scale + bias), rounded to the dtype of x."""
    y = round_to(ACT((_widened(x) - mean) * scale + bias, param), x.dtype)
    if INTERPRETED:
        y = y.to(tl.float32)  # the interpreter can't compare bfloat16
    return y


@triton.jit
def _load_row(row_ptr, left, middle, right, exists, TILE: tl.constexpr):
    """Loads x at each window's left, middle and right position in one row.

    In contiguous tensors, a row of the tile is a vector of windows. The left position is loaded
    only for the vector's first window, because each later window's left position is the right
    position of the window before.
    """
    x_left = tl.load(row_ptr + left, mask=exists)
    if TILE.kind == CHANNELS:
        return x_left, tl.load(row_ptr + middle, mask=exists), tl.load(row_ptr + right, mask=exists)
    else:
        x, x_right = _load_two(row_ptr, 1, middle, exists, exists, TILE)
        return x_left, x, x_right


@triton.jit
def _greatest_of_row(
    x_left, x, x_right, first, left_tap, right_tap, mean, scale, bias, param,
    ACT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Returns the greatest value in one row of each window, and its result of `_tagged`.

    The row's positions in the window are ``first``, ``first + 1`` and ``first + 2``. ``left_tap``
    is 0 and ``right_tap`` is 2. At an edge of x, the tap beyond the edge is 1 instead, because the
    middle position replaces the missing one.
    """
    y_right = _value(x_right, mean, scale, bias, param, ACT)
    best = _value(x_left, mean, scale, bias, param, ACT)
    tagged = _tagged(x_left, first + left_tap)
    if TILE.kind != CHANNELS:
        best, tagged = _after(best, y_right), _after(tagged, _tagged(x_right, first))
    y = _value(x, mean, scale, bias, param, ACT)
    best, tagged = _greater(best, tagged, y, _tagged(x, first + 1))
    return _greater(best, tagged, y_right, _tagged(x_right, first + right_tap))


@triton.jit
def _bn_max_pool_kernel(
    y_ptr, argmax_ptr, x_max_ptr, x_ptr,
    mean_ptr, rstd_ptr, var_ptr, weight_ptr, bias_ptr,
    columns, C, H, W, OH, OW, rows_per_program, act_param: tl.float64, eps: tl.float64,
    ACT: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stores y = max of act(bn(x)) over each window.

    If argmax_ptr and x_max_ptr are not None, the kernel also stores each maximum's position in its
    window, and the x at this position.
    """
    col_block, block, start, stop = _program(C, OH, rows_per_program, TILE)
    step, W, OW = _sizes(C, W, OW, TILE)
    plane, ow, exists, local, channel = _columns(col_block, block, columns, C, OW, TILE)
    mean, _, scale = load_norm(
        mean_ptr, rstd_ptr, var_ptr, weight_ptr, eps, channel, channel < C, tl.float32
    )
    bias = load_biases(bias_ptr, None, channel, channel < C, tl.float32)
    param = tl.full((), act_param, tl.float32)

    position = plane * (H * W) + 2 * ow
    has_left, has_right = ow > 0, 2 * ow + 1 < W
    left_tap, right_tap = tl.where(has_left, 0, 1), tl.where(has_right, 2, 1)
    left = (position - tl.where(has_left, 1, 0)) * step
    if TILE.kind == CHANNELS:
        left += local
    middle = position * step + local
    right = (position + tl.where(has_right, 1, 0)) * step + local
    at = (plane * (OH * OW) + ow) * step + local

    row_ptr = x_ptr + tl.maximum(2 * start - 1, 0) * (W * step)
    x_left, x, x_right = _load_row(row_ptr, left, middle, right, exists, TILE)
    low, low_tagged = _greatest_of_row(
        x_left, x, x_right, tl.where(start > 0, 0, 3), left_tap, right_tap, mean, scale, bias,
        param, ACT, TILE,
    )  # fmt: skip
    for oh in tl.range(start, stop, num_stages=STAGES):
        row_ptr = x_ptr + 2 * oh * (W * step)
        has_low = 2 * oh + 1 < H
        low_ptr = row_ptr + tl.where(has_low, W * step, 0)
        x_left, x, x_right = _load_row(row_ptr, left, middle, right, exists, TILE)
        low_left, low_x, low_right = _load_row(low_ptr, left, middle, right, exists, TILE)
        y, tagged = _greatest_of_row(
            x_left, x, x_right, 3, left_tap, right_tap, mean, scale, bias, param, ACT, TILE
        )
        y, tagged = _greater(low, low_tagged, y, tagged)
        # These windows' last row of x is the first row of the windows below.
        low, low_tagged = _greatest_of_row(
            low_left, low_x, low_right, 0, left_tap, right_tap, mean, scale, bias, param, ACT, TILE
        )
        y, tagged = _greater(y, tagged, low, low_tagged + tl.where(has_low, 6, 3))
        offsets = oh * (OW * step) + at
        tl.store(y_ptr + offsets, round_to(y, y_ptr.dtype.element_ty), mask=exists)
        if argmax_ptr is not None:
            x_max, argmax = _untagged(tagged, x_max_ptr.dtype.element_ty)
            tl.store(argmax_ptr + offsets, argmax, mask=exists)
            tl.store(x_max_ptr + offsets, x_max, mask=exists)


@triton.jit
def _load_windows(dy_ptr, argmax_ptr, at, next_at, exists, has_next, TILE: tl.constexpr):
    """Loads dy and argmax of each window and of the window's right neighbour.

    If a window does not exist, its argmax is 255, which is not a position in a window.
    """
    dy = tl.load(dy_ptr + at, mask=exists).to(tl.float32)
    argmax = tl.load(argmax_ptr + at, mask=exists, other=255).to(tl.int32)
    dy_next = tl.load(dy_ptr + next_at, mask=has_next).to(tl.float32)
    argmax_next = tl.load(argmax_ptr + next_at, mask=has_next, other=255).to(tl.int32)
    if TILE.kind != CHANNELS:
        dy_next, argmax_next = _before(dy, dy_next), _before(argmax, argmax_next)
    return dy, argmax, dy_next, argmax_next


@triton.jit
def _row_grads(dy, argmax, dy_next, argmax_next, first):
    """Returns the gradients at the middle and right positions of each window in one row of x.

    The right position is also the left position of the next window, so the next window's gradient
    is added. ``first`` is the left position's number in the window: 0, 3 or 6.
    """
    middle = tl.where(argmax == first + 1, dy, 0.0)
    right = tl.where(argmax == first + 2, dy, 0.0) + tl.where(argmax_next == first, dy_next, 0.0)
    return middle, right


@triton.jit
def _dx(dy, x, mean, scale, bias, line, param, ACT_GRAD: tl.constexpr):
    """Returns act'(z)·dy·scale + (x − mean)·slope + offset, rounded to the dtype of x.

    Here z = (x − mean)·scale + bias. ``line`` is the pair (offset, slope). If ``line`` is None,
    both are 0.
    """
    x_centred = _widened(x) - mean
    dx = ACT_GRAD(dy, x_centred * scale + bias, param) * scale
    if line is not None:
        dx += x_centred * line[1] + line[0]
    return round_to(dx, x.dtype)


@triton.jit
def _bn_max_pool_bwd_dx_kernel(
    dx_ptr, dy_ptr, argmax_ptr, x_ptr,
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    sum_dy_ptr, sum_dy_xhat_ptr,
    columns, C, H, W, OH, OW, rows_per_program, act_param: tl.float64, stats_count,
    ACT_GRAD: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stores dx = (dz − (sum_dy + xhat·sum_dy_xhat)/stats_count)·(rstd·weight).

    Here xhat = (x − mean)·rstd and dz = act'(z)·Σ dy. Σ dy is the sum of dy over all windows whose
    maximum is at this position of x. If sum_dy_ptr is None, dx = dz·(rstd·weight).

    Each step of the loop processes a row of windows, which covers three rows of x, and stores dx of
    the first two. The third row also belongs to the windows below, so the next step stores its dx.
    The loop therefore has one step more than there are rows of windows.
    """
    col_block, block, start, stop = _program(C, OH + 1, rows_per_program, TILE)
    step, W, OW = _sizes(C, W, OW, TILE)
    plane, ow, exists, local, channel = _columns(col_block, block, columns, C, OW, TILE)
    mean, rstd, scale = load_norm(
        mean_ptr, rstd_ptr, None, weight_ptr, 0.0, channel, channel < C, tl.float32
    )
    bias = load_biases(bias_ptr, None, channel, channel < C, tl.float32)
    line = None
    if sum_dy_ptr is not None:
        line = load_line(
            sum_dy_ptr, sum_dy_xhat_ptr, (mean, rstd, scale), stats_count, channel, channel < C,
            TILE, tl.float32,
        )  # fmt: skip
    param = tl.full((), act_param, tl.float32)

    x_at = (plane * (H * W) + 2 * ow) * step + local
    has_right = exists & (2 * ow + 1 < W)
    window = plane * (OH * OW) + ow
    at = window * step + local
    if TILE.kind == CHANNELS:
        has_next = exists & (ow + 1 < OW)
        next_at = (window + 1) * step + local
    else:
        has_next = exists & (ow + TILE.vector < OW)
        next_at = window + TILE.vector
    one = tl.arange(0, 1)[:, None]  # 0: adding it to a scalar gives a (1, 1) tensor

    row = (start - 1) * (OW * step)
    in_row = start + one > 0
    dy, argmax, dy_next, argmax_next = _load_windows(
        dy_ptr + row, argmax_ptr + row, at, next_at, exists & in_row, has_next & in_row, TILE
    )
    dy_up, dy_up_right = _row_grads(dy, argmax, dy_next, argmax_next, 6)
    for oh in tl.range(start, stop, num_stages=STAGES):
        row = oh * (OW * step)
        in_row = oh + one < OH
        dy, argmax, dy_next, argmax_next = _load_windows(
            dy_ptr + row, argmax_ptr + row, at, next_at, exists & in_row, has_next & in_row, TILE
        )
        row = 2 * oh * (W * step)
        up_row = row - W * step
        in_up = (oh + one > 0) & (2 * oh - 1 + one < H)
        x_up, x_up_right = _load_two(
            x_ptr + up_row, step, x_at, exists & in_up, has_right & in_up, TILE
        )
        x, x_right = _load_two(x_ptr + row, step, x_at, exists & in_row, has_right & in_row, TILE)

        first, first_right = _row_grads(dy, argmax, dy_next, argmax_next, 0)
        dx = _dx(dy_up + first, x_up, mean, scale, bias, line, param, ACT_GRAD)
        dx_right = _dx(
            dy_up_right + first_right, x_up_right, mean, scale, bias, line, param, ACT_GRAD
        )
        _store_two(
            dx_ptr + up_row, step, x_at, dx, dx_right, exists & in_up, has_right & in_up, TILE
        )
        second, second_right = _row_grads(dy, argmax, dy_next, argmax_next, 3)
        dx = _dx(second, x, mean, scale, bias, line, param, ACT_GRAD)
        dx_right = _dx(second_right, x_right, mean, scale, bias, line, param, ACT_GRAD)
        _store_two(
            dx_ptr + row, step, x_at, dx, dx_right, exists & in_row, has_right & in_row, TILE
        )
        dy_up, dy_up_right = _row_grads(dy, argmax, dy_next, argmax_next, 6)


def bn_max_pool(
    x: Tensor,
    norm: Norm,
    act: str,
    act_param: float,
    *,
    save: bool = False,
    out: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns y = max_pool2d(act(norm(x)), 3, stride=2, padding=1), argmax and x_max.

    argmax is a uint8 tensor that has each maximum's position in its window, counted row by row from
    0 to 8. x_max is the value of x at this position. Without ``save``, argmax and x_max are None.
    All results have the memory format of ``x``. Ties, NaN and padding are handled as in
    `torch.nn.functional.max_pool2d`. `config.has_pool_kernel` must return True for ``x``.
    """
    y, argmax, x_max = out or (empty_pooled(x), None, None)
    if save and out is None:
        argmax, x_max = torch.empty_like(y, dtype=torch.uint8), torch.empty_like(y)
    if y.numel() == 0:
        return y, argmax, x_max
    launch(
        _bn_max_pool_kernel,
        plan_columns("pool", x, rows=y.shape[2]),
        y_ptr=y,
        argmax_ptr=argmax,
        x_max_ptr=x_max,
        x_ptr=x,
        **norm.pointers(),
        act_param=act_param,
        ACT=ACTIVATIONS[act].forward,
    )
    return y, argmax, x_max


def bn_max_pool_backward_dx(
    dy: Tensor,
    argmax: Tensor,
    x: Tensor,
    norm: Norm,
    act: str,
    act_param: float,
    sums: Sums | None,
    count: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Returns dx, the gradient with respect to the ``x`` of `bn_max_pool`.

    ``dy`` is the gradient of the pooled tensor. ``dy`` and ``argmax`` have the memory format of
    ``x``. ``sums`` are Σ dz and Σ dz·xhat of each channel, where dz is the gradient of the
    activation's input. ``count`` is the number of elements of a channel of ``x``. In evaluation
    ``sums`` is None, because the statistics are constants.
    """
    dx = torch.empty_like(x) if out is None else out
    if x.numel() == 0:
        return dx
    launch(
        _bn_max_pool_bwd_dx_kernel,
        plan_columns("pool_dx", x, rows=dy.shape[2] + 1),
        dx_ptr=dx,
        dy_ptr=dy,
        argmax_ptr=argmax,
        x_ptr=x,
        **norm.pointers(),
        sum_dy_ptr=None if sums is None else sums.dy,
        sum_dy_xhat_ptr=None if sums is None else sums.dy_xhat,
        act_param=act_param,
        stats_count=count,
        ACT_GRAD=ACTIVATIONS[act].grad,
    )
    return dx
