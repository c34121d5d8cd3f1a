"""The three kernels of batch norm's forward pass, and their launchers.

The elements of each channel are divided among programs. The part of one program is called a split.

- The statistics kernel computes the sums of each split.
- The finalize kernel computes each channel's statistics from the sums of all splits.
- The apply kernel computes y.

`bnres.kernels.tiles` explains tiles and sub-tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.channels import FINALIZE_CHANNELS, add_ranks, add_splits, load_norms
from bnres.kernels.device import ACTIVATIONS, round_to
from bnres.kernels.launch import launch, plan, plan_ranks
from bnres.kernels.norm import Norm, Statistics, pointers
from bnres.kernels.outputs import empty_channels, empty_mask, empty_moments
from bnres.kernels.tiles import (
    channel_ids,
    load_tile,
    mask_offsets,
    pack_bits,
    rows_exist,
    split_rows,
    store_tile,
    tile_at,
    to_channels,
    to_columns,
    whole_rows,
)


@triton.jit
def _sample(x_ptr, index, offs_c, mask_c, shape, TILE: tl.constexpr, ACC: tl.constexpr):
    """Loads element ``index`` of each channel: (channels,)."""
    _, C, L = shape
    INDEX: tl.constexpr = tl.int32 if TILE.narrow else tl.int64
    n = index // L
    offsets = tl.cast(n, INDEX) * C * L + offs_c.to(INDEX) * L + (index - n * L)
    return tl.load(x_ptr + offsets, mask=mask_c, other=0).to(ACC)


@triton.jit
def _adaptive_pivot(x_ptr, offs_c, mask_c, shape, TILE: tl.constexpr, ACC: tl.constexpr):
    """Returns the pivot of each channel: (channels,). The sums are computed from x − pivot.

    Any finite pivot is correct. A pivot near the data avoids cancellation if the data are far from
    zero. The pivot is estimated from four elements. It is 0 if the magnitude of the estimate is
    small compared with the spread of the elements, or at least 1e38.
    """
    count = shape[0]
    a = _sample(x_ptr, count // 8, offs_c, mask_c, shape, TILE, ACC)
    b = _sample(x_ptr, count // 8 * 3, offs_c, mask_c, shape, TILE, ACC)
    c = _sample(x_ptr, count // 8 * 5, offs_c, mask_c, shape, TILE, ACC)
    d = _sample(x_ptr, count - 1 - count // 8, offs_c, mask_c, shape, TILE, ACC)
    low = tl.maximum(tl.minimum(a, b), tl.minimum(c, d))
    high = tl.minimum(tl.maximum(a, b), tl.maximum(c, d))
    middle = low + (high - low) * 0.5
    near = (tl.abs(middle) > 2 * tl.abs(high - low)) & (tl.abs(middle) < 1e38)
    return tl.where(near, middle, 0.0)


@triton.jit
def _add_sub_tile(
    sums, x_ptr, pivot, row, col_block, shape,
    TILE: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds x − pivot and (x − pivot)² of a sub-tile to the sums."""
    sum_d, sum_d2 = sums
    load_at, _ = tile_at(row, col_block, shape, TILE, 1, WHOLE)
    d = load_tile(x_ptr, load_at, TILE, ACC) - pivot
    d = tl.where(rows_exist(row, shape[0], TILE, 1, WHOLE), d, 0.0)
    return sum_d + d, sum_d2 + d * d


@triton.jit
def _bn_stats_kernel(
    sums_ptr, x_ptr,
    count, C, L, rows_per_split,
    TILE: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores each channel's Σ(x − pivot) and Σ(x − pivot)² over a split, and its pivot.

    sums_ptr points to a tensor (2·splits + 1, C). Its rows are Σ(x − pivot) of each split, then
    Σ(x − pivot)² of each split, then the pivot.
    """
    col_block, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    shape = count, C, L
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    pivot = _adaptive_pivot(x_ptr, offs_c, mask_c, shape, TILE, ACC)
    if split == 0:
        tl.store(sums_ptr + 2 * tl.cast(splits, tl.int64) * C + offs_c, pivot, mask=mask_c)
    pivot = to_columns(pivot, TILE)
    zeros = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    sums = zeros, zeros
    start, stop = split_rows(split, rows_per_split, count, TILE)
    whole = whole_rows(start, stop, count, TILE, UNROLL)
    for row in tl.range(start, whole, UNROLL * TILE.sub_rows, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            sums = _add_sub_tile(
                sums, x_ptr, pivot, row + u * TILE.sub_rows, col_block, shape, TILE, True, ACC,
            )  # fmt: skip
    for row in tl.range(whole, stop, TILE.sub_rows, num_stages=1):
        sums = _add_sub_tile(sums, x_ptr, pivot, row, col_block, shape, TILE, False, ACC)
    sum_d, sum_d2 = sums
    out = sums_ptr + tl.cast(split, tl.int64) * C + offs_c
    tl.store(out, to_channels(sum_d, TILE), mask=mask_c)
    tl.store(out + tl.cast(splits, tl.int64) * C, to_channels(sum_d2, TILE), mask=mask_c)


@triton.jit
def _update_running(ptr, running, stat, factor, offs_c, mask_c):
    """Computes (1 − factor)·running + factor·stat in fp64, and stores it in the buffer's dtype."""
    updated = (1 - factor) * running.to(tl.float64) + factor * stat
    if ptr.dtype.element_ty != tl.float64:
        updated = round_to(updated.to(tl.float32), ptr.dtype.element_ty)
    tl.store(ptr + offs_c, updated, mask=mask_c)


@triton.jit
def _bn_stats_finalize_kernel(
    mean_ptr, rstd_ptr, m2_ptr, total_ptr,
    running_mean_ptr, running_var_ptr, counter_ptr, sums_ptr, ranks_ptr, momentum_ptr,
    input_bias_ptr,
    count, C, splits, rank_stride, momentum: tl.float64, eps: tl.float64, TRIPS: tl.constexpr,
):  # fmt: skip
    """Stores each channel's mean, and either rstd = 1/sqrt(var + eps) or M2 = Σ(x − mean)²: (C,).

    If ranks_ptr is None, the kernel combines the sums of one tensor's splits. Otherwise it combines
    the count, mean and M2 of each rank (process), and stores the sum of the counts as ``total``.
    Then ``splits`` is the number of ranks.

    The kernel also updates the running mean with mean + input_bias and the running variance with
    the unbiased variance, and adds 1 to the counter. The pointers to these three may be None. If
    ``total`` is 0, the running statistics stay unchanged.
    """
    offs_c = tl.program_id(0) * FINALIZE_CHANNELS + tl.arange(0, FINALIZE_CHANNELS)
    mask_c = offs_c < C
    # All loads come before the first `tl.sum`, because `tl.sum` has a barrier, which would delay
    # the loads after it.
    plane = tl.cast(splits, tl.int64) * C
    if ranks_ptr is not None:
        counts, sum_d, sum_d2, pivot = add_ranks(
            ranks_ptr, splits, rank_stride, offs_c, mask_c, C, TRIPS
        )
    else:
        sum_d = add_splits(sums_ptr, splits, offs_c, mask_c, C, TRIPS)
        sum_d2 = add_splits(sums_ptr + plane, splits, offs_c, mask_c, C, TRIPS)
        pivot = tl.load(sums_ptr + 2 * plane + offs_c, mask=mask_c, other=0).to(tl.float64)
    factor = tl.full((), momentum, tl.float64)
    if momentum_ptr is not None:
        factor = tl.load(momentum_ptr).to(tl.float64)
    # Several threads load the same element, and one of them stores the new value. No barrier is
    # needed, because the storing thread uses only the value that it loaded itself.
    if running_mean_ptr is not None:
        running_mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0)
    if running_var_ptr is not None:
        running_var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0)
    input_bias = tl.zeros((FINALIZE_CHANNELS,), tl.float64)
    if input_bias_ptr is not None:
        input_bias = tl.load(input_bias_ptr + offs_c, mask=mask_c, other=0).to(tl.float64)
    if counter_ptr is not None and tl.program_id(0) == 0:
        tl.store(counter_ptr, tl.load(counter_ptr) + 1)
    n = tl.cast(count, tl.float64)
    more = n - 1
    if ranks_ptr is not None:
        total = tl.sum(counts, 0)
        if tl.program_id(0) == 0:
            tl.store(total_ptr + offs_c, total, mask=offs_c == 0)
        n = tl.maximum(total, 1.0)
        more = tl.maximum(total - 1, 1.0)
        mask_running = mask_c & (total > 0)
    else:
        mask_running = mask_c
    shift = tl.sum(sum_d, 0) / n
    square = tl.sum(sum_d2, 0) / n
    mean = pivot + shift
    var = square - shift * shift
    var = tl.where(var < 0, 0.0, var)
    tl.store(mean_ptr + offs_c, mean.to(mean_ptr.dtype.element_ty), mask=mask_c)
    if m2_ptr is not None:
        tl.store(m2_ptr + offs_c, (var * n).to(m2_ptr.dtype.element_ty), mask=mask_c)
    if rstd_ptr is not None:
        rstd = 1 / tl.sqrt(var + tl.full((), eps, tl.float64))
        tl.store(rstd_ptr + offs_c, rstd.to(rstd_ptr.dtype.element_ty), mask=mask_c)
    if running_mean_ptr is not None:
        mean += input_bias
        _update_running(running_mean_ptr, running_mean, mean, factor, offs_c, mask_running)
    if running_var_ptr is not None:
        unbiased = var * (n / more)
        _update_running(running_var_ptr, running_var, unbiased, factor, offs_c, mask_running)


@triton.jit
def _apply_tile(
    y_ptr, mask_ptr, x_ptr, residual_ptr, norms, param, row, col_block, shape,
    TWO_NORMS: tl.constexpr, ACT: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr,
    WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores a tile of y and, if mask_ptr is not None, the tile's mask bits."""
    norm, residual_norm, shift = norms
    mean, _, scale = norm
    load_at, at = tile_at(row, col_block, shape, TILE, UNROLL, WHOLE)
    x = load_tile(x_ptr, load_at, TILE, ACC)
    if residual_ptr is not None:
        residual = load_tile(residual_ptr, load_at, TILE, ACC)
    z = (x - mean) * scale
    if TWO_NORMS:
        residual_mean, _, residual_scale = residual_norm
        z += (residual - residual_mean) * residual_scale
    z += shift
    if residual_ptr is not None and not TWO_NORMS:
        z += residual
    store_tile(y_ptr, ACT(z, param), at)
    if mask_ptr is not None:
        bit_offsets, bit_mask = mask_offsets(row, col_block, shape, TILE, UNROLL)
        # A bit is set where relu's gradient is dy, and clear where it is 0. As in torch, it is dy
        # where z is NaN.
        bits = pack_bits(tl.where(z <= 0, 0, 1), TILE, UNROLL)
        tl.store(mask_ptr + bit_offsets, bits, mask=bit_mask)


@triton.jit
def _bn_apply_kernel(
    y_ptr, mask_ptr, x_ptr, residual_ptr,
    mean_ptr, rstd_ptr, var_ptr, weight_ptr, bias_ptr,
    residual_mean_ptr, residual_rstd_ptr, residual_var_ptr, residual_weight_ptr, residual_bias_ptr,
    count, C, L, rows_per_split, act_param: tl.float64, eps: tl.float64, residual_eps: tl.float64,
    ACT: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Stores y = act(z), where z = (x − mean)·(rstd·weight) + bias + residual.

    If the residual has its own batch norm, the residual is normalised like x before the sum. If
    mask_ptr is not None, the kernel also stores one bit per element, which is set where z > 0 or z
    is NaN.
    """
    col_block, split = tl.program_id(0), tl.program_id(1)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    norms = load_norms(
        (mean_ptr, rstd_ptr, var_ptr, weight_ptr, bias_ptr),
        (
            residual_mean_ptr, residual_rstd_ptr, residual_var_ptr, residual_weight_ptr,
            residual_bias_ptr,
        ),
        eps, residual_eps, offs_c, mask_c, TILE, ACC,
    )  # fmt: skip
    param = tl.full((), act_param, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    whole = whole_rows(start, stop, count, TILE, UNROLL)
    for row in tl.range(start, whole, UNROLL * TILE.sub_rows, num_stages=STAGES):
        _apply_tile(
            y_ptr, mask_ptr, x_ptr, residual_ptr, norms, param, row, col_block, (count, C, L),
            residual_mean_ptr is not None, ACT, TILE, UNROLL, True, ACC,
        )  # fmt: skip
    for row in tl.range(whole, stop, UNROLL * TILE.sub_rows, num_stages=1):
        _apply_tile(
            y_ptr, mask_ptr, x_ptr, residual_ptr, norms, param, row, col_block, (count, C, L),
            residual_mean_ptr is not None, ACT, TILE, UNROLL, False, ACC,
        )  # fmt: skip


def bn_stats(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    *,
    input_bias: Tensor | None = None,
    counter: Tensor | None = None,
    out: Statistics | None = None,
) -> Statistics:
    """Returns each channel's mean and 1/sqrt(biased variance + eps): (C,).

    The statistics are in fp64 if ``x`` is fp64, otherwise in fp32. ``running_mean`` is updated in
    place with the mean of ``x + input_bias``, and ``running_var`` with the unbiased variance.
    ``counter`` is an int64 tensor of one element, to which 1 is added. ``momentum`` may be a tensor
    of one element on the device of ``x``. If ``x`` is empty, the counter is incremented, but the
    running statistics don't change.
    """
    mean, rstd = out = out or Statistics(*empty_channels(x, 2))
    if x.numel() == 0:
        if counter is not None:
            counter.add_(1)
        mean.zero_()
        rstd.zero_()
        return out
    stats = plan("stats", x)
    # `_bn_stats_kernel` describes the rows.
    sums = torch.empty((2 * stats.splits + 1, x.shape[1]), dtype=mean.dtype, device=x.device)
    launch(_bn_stats_kernel, stats, sums_ptr=sums, x_ptr=x)
    on_device = isinstance(momentum, Tensor)
    launch(
        _bn_stats_finalize_kernel,
        stats.finalize,
        mean_ptr=mean,
        rstd_ptr=rstd,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        counter_ptr=counter,
        sums_ptr=sums,
        momentum_ptr=momentum if on_device else None,
        input_bias_ptr=input_bias,
        momentum=0.0 if on_device else momentum,
        eps=eps,
    )
    return out


def bn_moments(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Returns count, mean and M2 = Σ(x − mean)² of each channel: (3, C).

    The dtype is fp64 if ``x`` is fp64, otherwise fp32. If ``x`` is empty, all three are 0. ``out``
    must come from `empty_moments`, which writes the count.
    """
    if out is None:
        out = empty_moments(x)
    if x.numel():
        stats = plan("stats", x)
        sums = torch.empty((2 * stats.splits + 1, x.shape[1]), dtype=out.dtype, device=x.device)
        launch(_bn_stats_kernel, stats, sums_ptr=sums, x_ptr=x)
        launch(
            _bn_stats_finalize_kernel,
            stats.finalize,
            mean_ptr=out[1],
            m2_ptr=out[2],
            sums_ptr=sums,
            momentum=0.0,
        )
    return out


def bn_combine(
    moments: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    *,
    counter: Tensor | None = None,
    out: tuple[Statistics, Tensor] | None = None,
) -> tuple[Statistics, Tensor]:
    """Returns the statistics over the batches of all ranks, and the total count (1,) in fp64.

    A rank is a process. ``moments`` (ranks, 3, C) has the result of `bn_moments` from each rank.
    The moments are combined by Chan et al.'s formula for parallel variances. The order of the
    additions is fixed, so the results are bit-equal on all ranks. If the total count is 0, the
    running statistics don't change. `bn_stats` describes the statistics and the other arguments.
    """
    if out is None:
        rows = [torch.empty_like(moments[0, 0]) for _ in range(2)]
        out = Statistics(*rows), moments.new_empty(1, dtype=torch.float64)
    (mean, rstd), total = out
    on_device = isinstance(momentum, Tensor)
    launch(
        _bn_stats_finalize_kernel,
        plan_ranks(*moments.shape[::2]),
        mean_ptr=mean,
        rstd_ptr=rstd,
        total_ptr=total,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        counter_ptr=counter,
        ranks_ptr=moments,
        rank_stride=moments.stride(0),
        momentum_ptr=momentum if on_device else None,
        momentum=0.0 if on_device else momentum,
        eps=eps,
    )
    return out


def bn_apply(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    act: str,
    act_param: float,
    *,
    save_mask: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns y = act(z), where z = norm(x) + residual_norm(residual), and a mask.

    If ``residual_norm`` is None, the residual is added unchanged. ``residual`` has the memory
    format of ``x``. The mask has one bit per element, which is set where z > 0 or z is NaN. Without
    ``save_mask``, the mask is None.
    """
    y, mask = out or (torch.empty_like(x), empty_mask(x) if save_mask else None)
    if x.numel() == 0:
        return y, mask
    name = "apply_residual" if residual_norm is None else "apply_two_norms"
    launch(
        _bn_apply_kernel,
        plan("apply" if residual is None else name, x),
        y_ptr=y,
        mask_ptr=mask,
        x_ptr=x,
        residual_ptr=residual,
        **pointers(norm, residual_norm),
        act_param=act_param,
        ACT=ACTIVATIONS[act].forward,
    )
    return y, mask
