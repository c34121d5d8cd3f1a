"""Batch norm forward: statistics -> finalize -> apply, and their launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.channels import load_biases, load_norm, scaled, sum_splits
from bnres.kernels.device import ACTIVATIONS, round_to
from bnres.kernels.launch import launch, plan
from bnres.kernels.norm import Norm, Statistics, pointers
from bnres.kernels.outputs import empty_channels, empty_mask
from bnres.kernels.tiles import (
    channel_ids,
    fold,
    mask_offsets,
    pack_bits,
    split_rows,
    tile_offsets,
    to_channels,
    to_columns,
)


@triton.jit
def _sample(x_ptr, index, offs_c, mask_c, C, L, ACC: tl.constexpr):
    """Element ``index`` of each channel."""
    n = tl.cast(index // L, tl.int64)
    offsets = n * C * L + offs_c.to(tl.int64) * L + index % L
    return tl.load(x_ptr + offsets, mask=mask_c, other=0).to(ACC)


@triton.jit
def _adaptive_pivot(x_ptr, offs_c, mask_c, count, C, L, ACC: tl.constexpr):
    """A value near the data if they lie far from zero, else 0: (channels,).

    The mean of the middle two of four samples, if it is large against their distance. Any finite
    value gives right sums; a near one keeps them from cancelling.
    """
    a = _sample(x_ptr, count // 8, offs_c, mask_c, C, L, ACC)
    b = _sample(x_ptr, count // 8 * 3, offs_c, mask_c, C, L, ACC)
    c = _sample(x_ptr, count // 8 * 5, offs_c, mask_c, C, L, ACC)
    d = _sample(x_ptr, count - 1 - count // 8, offs_c, mask_c, C, L, ACC)
    low = tl.maximum(tl.minimum(a, b), tl.minimum(c, d))
    high = tl.minimum(tl.maximum(a, b), tl.maximum(c, d))
    middle = low + (high - low) * 0.5
    near = (tl.abs(middle) > 2 * tl.abs(high - low)) & (tl.abs(middle) < 1e38)
    return tl.where(near, middle, 0.0)


@triton.jit
def _bn_stats_kernel(
    sums_ptr, x_ptr,
    count, C, L, rows_per_split,
    TILE: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, EVICTION: tl.constexpr,
    INNER_POW2: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Σ(x − pivot) and its square over a split's rows, and the pivot: sums is (2·splits + 1, C)."""
    col_block, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    pivot = _adaptive_pivot(x_ptr, offs_c, mask_c, count, C, L, ACC)
    if split == 0:
        tl.store(sums_ptr + 2 * tl.cast(splits, tl.int64) * C + offs_c, pivot, mask=mask_c)
    pivot_cols = to_columns(pivot, TILE)
    sum_d = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    sum_d2 = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    for row in tl.range(start, stop, UNROLL * TILE.sub_rows, num_stages=STAGES):
        offsets, mask = tile_offsets(row, col_block, count, C, L, TILE, UNROLL)
        x = tl.load(x_ptr + offsets, mask=mask, other=0, eviction_policy=EVICTION).to(ACC)
        d = tl.where(mask, x - pivot_cols, 0.0)
        sum_d += fold(d, TILE, UNROLL)
        sum_d2 += fold(d * d, TILE, UNROLL)
    out = sums_ptr + tl.cast(split, tl.int64) * C + offs_c
    tl.store(out, to_channels(sum_d, TILE, INNER_POW2), mask=mask_c)
    tl.store(
        out + tl.cast(splits, tl.int64) * C, to_channels(sum_d2, TILE, INNER_POW2), mask=mask_c
    )


@triton.jit
def _update_running(ptr, stat, factor, offs_c, mask_c):
    """running = (1 − factor)·running + factor·stat, computed in fp64, stored in the buffer's dtype."""
    # Several threads load an element and one of them stores it. No barrier is needed: the thread that
    # stores uses its own load, and what the others load is not used.
    running = tl.load(ptr + offs_c, mask=mask_c, other=0).to(tl.float64)
    updated = ((1 - factor) * running + factor * stat).to(tl.float32)
    if ptr.dtype.element_ty == tl.float64:
        tl.store(ptr + offs_c, (1 - factor) * running + factor * stat, mask=mask_c)
    else:
        tl.store(ptr + offs_c, round_to(updated, ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _bn_stats_finalize_kernel(
    mean_ptr, rstd_ptr,
    running_mean_ptr, running_var_ptr, counter_ptr, sums_ptr, momentum_ptr, input_bias_ptr,
    count, C, splits, momentum: tl.float64,
    eps: tl.float64,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean, rstd = 1/sqrt(var + eps) of each channel (C,).

    Updates the running statistics, with the mean of x + input_bias, and counts the batch.
    """
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    n = tl.cast(count, tl.float64)
    shift = sum_splits(sums_ptr, splits, offs_c, mask_c, C, BLOCK_S, BLOCK_C) / n
    plane = tl.cast(splits, tl.int64) * C
    square = sum_splits(sums_ptr + plane, splits, offs_c, mask_c, C, BLOCK_S, BLOCK_C) / n
    mean = tl.load(sums_ptr + 2 * plane + offs_c, mask=mask_c, other=0).to(tl.float64) + shift
    var = square - shift * shift
    var = tl.where(var < 0, 0.0, var)
    rstd = 1 / tl.sqrt(var + tl.full((), eps, tl.float64))
    tl.store(mean_ptr + offs_c, mean.to(mean_ptr.dtype.element_ty), mask=mask_c)
    tl.store(rstd_ptr + offs_c, rstd.to(rstd_ptr.dtype.element_ty), mask=mask_c)
    factor = tl.full((), momentum, tl.float64)
    if momentum_ptr is not None:
        factor = tl.load(momentum_ptr).to(tl.float64)
    if running_mean_ptr is not None:
        if input_bias_ptr is not None:
            mean += tl.load(input_bias_ptr + offs_c, mask=mask_c, other=0).to(tl.float64)
        _update_running(running_mean_ptr, mean, factor, offs_c, mask_c)
    if running_var_ptr is not None:
        _update_running(running_var_ptr, var * (n / (n - 1)), factor, offs_c, mask_c)
    if counter_ptr is not None and tl.program_id(0) == 0:
        tl.store(counter_ptr, tl.load(counter_ptr) + 1)


@triton.jit
def _bn_apply_kernel(
    y_ptr, mask_ptr, x_ptr, residual_ptr,
    mean_ptr, rstd_ptr, var_ptr, weight_ptr, bias_ptr,
    residual_mean_ptr, residual_rstd_ptr, residual_var_ptr, residual_weight_ptr, residual_bias_ptr,
    count, C, L, rows_per_split, act_param: tl.float64, eps: tl.float64, residual_eps: tl.float64,
    ACT: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """y = act((x − mean)·(rstd·weight) + bias + residual); mask = not z <= 0, 1 bit each.

    The residual may have a norm too.
    """
    col_block, split = tl.program_id(0), tl.program_id(1)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    mean, _, scale = load_norm(mean_ptr, rstd_ptr, var_ptr, weight_ptr, eps, offs_c, mask_c, ACC)
    mean, scale = to_columns(mean, TILE), to_columns(scale, TILE)
    shift, residual_scale = None, None
    if residual_mean_ptr is not None:
        residual_mean, _, residual_scale = load_norm(
            residual_mean_ptr, residual_rstd_ptr, residual_var_ptr, residual_weight_ptr,
            residual_eps, offs_c, mask_c, ACC,
        )  # fmt: skip
        residual_mean = to_columns(residual_mean, TILE)
        residual_scale = to_columns(residual_scale, TILE)
        shift = to_columns(load_biases(bias_ptr, residual_bias_ptr, offs_c, mask_c, ACC), TILE)
    elif bias_ptr is not None:
        shift = to_columns(tl.load(bias_ptr + offs_c, mask=mask_c, other=0).to(ACC), TILE)
    param = tl.full((), act_param, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    for row in tl.range(start, stop, UNROLL * TILE.sub_rows, num_stages=STAGES):
        offsets, mask = tile_offsets(row, col_block, count, C, L, TILE, UNROLL)
        x = tl.load(x_ptr + offsets, mask=mask, other=0)
        residual_centred = None
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offsets, mask=mask, other=0)
        if residual_mean_ptr is not None:
            residual_centred = residual.to(ACC) - residual_mean
        z = scaled(x.to(ACC) - mean, scale, residual_centred, residual_scale, shift)
        if residual_ptr is not None and residual_mean_ptr is None:
            z += residual.to(ACC)
        y = round_to(ACT(z, param), y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, y, mask=mask)
        if mask_ptr is not None:
            bit_offsets, bit_mask = mask_offsets(row, col_block, count, C, L, TILE, UNROLL)
            # Not (z <= 0): NaN keeps its gradient, as in torch.
            bits = pack_bits(tl.where(z <= 0, 0, 1), TILE, UNROLL)
            tl.store(mask_ptr + bit_offsets, bits, mask=bit_mask)


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
    """Batch mean and 1/sqrt(biased variance + eps) of each channel, each (C,) in fp32 (or fp64).

    The running buffers are updated in place with the mean of ``x + input_bias`` and the unbiased
    variance; ``counter``, one int64, goes up by one. ``momentum`` may be a one-element tensor on
    the device. An empty ``x`` counts, but leaves the buffers as they are.
    """
    mean, rstd = out = out or Statistics(*empty_channels(x, 2))
    if x.numel() == 0:
        if counter is not None:
            counter.add_(1)
        mean.zero_()
        rstd.zero_()
        return out
    stats = plan("stats", x)
    # Sums of x − pivot and of its square over splits, and the pivot.
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
    """``act(norm(x) + residual_norm(residual))`` and, if asked, the mask of ``not z <= 0``.

    ``residual`` is stored in memory as ``x`` is; without a ``residual_norm`` it is added as it is.
    ``out`` is (y, mask), allocated by the caller.
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
