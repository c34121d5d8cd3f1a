"""Batch norm backward: reduce -> finalize -> dx, and their launchers.

Both passes need dz = dy·act'(z), the gradient of the pre-activation. They take it from the mask if
there is one, else from z made again; y is never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.channels import load_biases, load_mean_grads, load_norm, scaled, sum_splits
from bnres.kernels.device import ACTIVATIONS, round_to
from bnres.kernels.launch import launch, plan
from bnres.kernels.norm import Norm, Sums, pointers
from bnres.kernels.outputs import empty_channels
from bnres.kernels.tiles import (
    channel_ids,
    fold,
    mask_offsets,
    split_rows,
    tile_offsets,
    to_channels,
    to_columns,
    unpack_bits,
)


@triton.jit
def _pre_activation_grad(
    dy_ptr, dy_skip_ptr, mask_ptr, residual_ptr,
    x_centred, scale, shift, residual_centred, residual_scale, param, row, col_block, count, C, L,
    ACT_GRAD: tl.constexpr, HAS_ACT: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr,
    EVICTION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz = (dy + dy_skip)·act'(z) of a tile, from the bit mask or from z made again as the forward made it."""
    offsets, mask = tile_offsets(row, col_block, count, C, L, TILE, UNROLL)
    dz = tl.load(dy_ptr + offsets, mask=mask, other=0, eviction_policy=EVICTION).to(ACC)
    if dy_skip_ptr is not None:
        dz += tl.load(dy_skip_ptr + offsets, mask=mask, other=0, eviction_policy=EVICTION).to(ACC)
    if mask_ptr is not None:
        bit_offsets, bit_mask = mask_offsets(row, col_block, count, C, L, TILE, UNROLL)
        packed = tl.load(mask_ptr + bit_offsets, mask=bit_mask, other=0)
        dz = tl.where(unpack_bits(packed, TILE, UNROLL), dz, 0.0)
    elif HAS_ACT:
        z = scaled(x_centred, scale, residual_centred, residual_scale, shift)
        if residual_ptr is not None and residual_scale is None:
            z += tl.load(residual_ptr + offsets, mask=mask, other=0).to(ACC)
        dz = ACT_GRAD(dz, z, param)
    return tl.where(mask, dz, 0.0)


@triton.jit
def _bn_bwd_reduce_kernel(
    partial_ptr, dz_ptr, dy_ptr, dy_skip_ptr, x_ptr, mask_ptr, residual_ptr,
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr,
    count, C, L, rows_per_split, act_param: tl.float64,
    ACT_GRAD: tl.constexpr, HAS_ACT: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, EVICTION: tl.constexpr, INNER_POW2: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of dz and, of each norm, dz·(x − mean) over a split's rows: partial is (2 or 3, splits, C)."""
    col_block, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    mean, _, scale = load_norm(mean_ptr, rstd_ptr, None, weight_ptr, 0.0, offs_c, mask_c, ACC)
    mean, scale = to_columns(mean, TILE), to_columns(scale, TILE)
    shift, residual_scale = None, None
    if residual_mean_ptr is not None:
        residual_mean, _, residual_scale = load_norm(
            residual_mean_ptr, residual_rstd_ptr, None, residual_weight_ptr, 0.0, offs_c, mask_c,
            ACC,
        )  # fmt: skip
        residual_mean = to_columns(residual_mean, TILE)
        residual_scale = to_columns(residual_scale, TILE)
        shift = to_columns(load_biases(bias_ptr, residual_bias_ptr, offs_c, mask_c, ACC), TILE)
    elif bias_ptr is not None:
        shift = to_columns(tl.load(bias_ptr + offs_c, mask=mask_c, other=0).to(ACC), TILE)
    param = tl.full((), act_param, ACC)
    sum_dz = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    sum_dz_xmu = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    sum_dz_rmu = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    for row in tl.range(start, stop, UNROLL * TILE.sub_rows, num_stages=STAGES):
        offsets, mask = tile_offsets(row, col_block, count, C, L, TILE, UNROLL)
        x = tl.load(x_ptr + offsets, mask=mask, other=0, eviction_policy=EVICTION)
        x_centred = x.to(ACC) - mean
        residual_centred = None
        if residual_mean_ptr is not None:
            residual = tl.load(residual_ptr + offsets, mask=mask, other=0, eviction_policy=EVICTION)
            residual_centred = residual.to(ACC) - residual_mean
        dz = _pre_activation_grad(
            dy_ptr, dy_skip_ptr, mask_ptr, residual_ptr, x_centred, scale, shift, residual_centred,
            residual_scale, param, row, col_block, count, C, L, ACT_GRAD, HAS_ACT, TILE, UNROLL,
            EVICTION, ACC,
        )  # fmt: skip
        if dz_ptr is not None:
            tl.store(dz_ptr + offsets, round_to(dz, dz_ptr.dtype.element_ty), mask=mask)
        sum_dz += fold(dz, TILE, UNROLL)
        sum_dz_xmu += fold(dz * x_centred, TILE, UNROLL)
        if residual_mean_ptr is not None:
            sum_dz_rmu += fold(dz * residual_centred, TILE, UNROLL)
    out = partial_ptr + tl.cast(split, tl.int64) * C + offs_c
    tl.store(out, to_channels(sum_dz, TILE, INNER_POW2), mask=mask_c)
    plane = tl.cast(splits, tl.int64) * C
    tl.store(out + plane, to_channels(sum_dz_xmu, TILE, INNER_POW2), mask=mask_c)
    if residual_mean_ptr is not None:
        tl.store(out + 2 * plane, to_channels(sum_dz_rmu, TILE, INNER_POW2), mask=mask_c)


@triton.jit
def _bn_bwd_finalize_kernel(
    sum_dy_ptr, sum_dy_xhat_ptr, residual_sum_dy_ptr, residual_sum_dy_xhat_ptr,
    partial_ptr, rstd_ptr, residual_rstd_ptr, C, splits,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum_dy and sum_dy_xhat = rstd·sum(dz·(x − mean)) of each channel, for each norm: (C,)."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    sum_dy = sum_splits(partial_ptr, splits, offs_c, mask_c, C, BLOCK_S, BLOCK_C)
    plane = tl.cast(splits, tl.int64) * C
    sum_xhat = sum_splits(partial_ptr + plane, splits, offs_c, mask_c, C, BLOCK_S, BLOCK_C)
    dtype: tl.constexpr = sum_dy_ptr.dtype.element_ty
    if residual_rstd_ptr is not None:
        sum_rhat = sum_splits(partial_ptr + 2 * plane, splits, offs_c, mask_c, C, BLOCK_S, BLOCK_C)
        sum_rhat *= tl.load(residual_rstd_ptr + offs_c, mask=mask_c, other=0).to(tl.float64)
        tl.store(residual_sum_dy_xhat_ptr + offs_c, sum_rhat.to(dtype), mask=mask_c)
        # Twice, as each bias has a gradient of its own.
        tl.store(residual_sum_dy_ptr + offs_c, sum_dy.to(dtype), mask=mask_c)
    sum_xhat *= tl.load(rstd_ptr + offs_c, mask=mask_c, other=0).to(tl.float64)
    tl.store(sum_dy_ptr + offs_c, sum_dy.to(dtype), mask=mask_c)
    tl.store(sum_dy_xhat_ptr + offs_c, sum_xhat.to(dtype), mask=mask_c)


@triton.jit
def _bn_bwd_dx_kernel(
    dx_ptr, dresidual_ptr, dy_ptr, dy_skip_ptr, x_ptr, mask_ptr, residual_ptr,
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr,
    sum_dy_ptr, sum_dy_xhat_ptr, residual_sum_dy_xhat_ptr,
    count, C, L, rows_per_split, act_param: tl.float64, stats_count,
    ACT_GRAD: tl.constexpr, HAS_ACT: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, EVICTION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = (dz − (sum_dy + xhat·sum_dy_xhat)/count)·(rstd·weight); without sums dz·(rstd·weight).

    dresidual is dz, or as dx where the residual has a norm.
    """
    col_block, split = tl.program_id(0), tl.program_id(1)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    mean, rstd, scale = load_norm(mean_ptr, rstd_ptr, None, weight_ptr, 0.0, offs_c, mask_c, ACC)
    if sum_dy_ptr is not None:
        mean_dy, slope = load_mean_grads(
            sum_dy_ptr, sum_dy_xhat_ptr, rstd, stats_count, offs_c, mask_c, ACC
        )
        mean_dy, slope = to_columns(mean_dy, TILE), to_columns(slope, TILE)
    mean, scale = to_columns(mean, TILE), to_columns(scale, TILE)
    shift, residual_scale = None, None
    if residual_mean_ptr is not None:
        residual_mean, residual_rstd, residual_scale = load_norm(
            residual_mean_ptr, residual_rstd_ptr, None, residual_weight_ptr, 0.0, offs_c, mask_c,
            ACC,
        )  # fmt: skip
        residual_mean = to_columns(residual_mean, TILE)
        residual_scale = to_columns(residual_scale, TILE)
        shift = to_columns(load_biases(bias_ptr, residual_bias_ptr, offs_c, mask_c, ACC), TILE)
        if sum_dy_ptr is not None:
            _, residual_slope = load_mean_grads(
                sum_dy_ptr, residual_sum_dy_xhat_ptr, residual_rstd, stats_count, offs_c, mask_c,
                ACC,
            )  # fmt: skip
            residual_slope = to_columns(residual_slope, TILE)
    elif bias_ptr is not None:
        shift = to_columns(tl.load(bias_ptr + offs_c, mask=mask_c, other=0).to(ACC), TILE)
    param = tl.full((), act_param, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    for row in tl.range(start, stop, UNROLL * TILE.sub_rows, num_stages=STAGES):
        offsets, mask = tile_offsets(row, col_block, count, C, L, TILE, UNROLL)
        x_centred = mean
        if sum_dy_ptr is not None or (HAS_ACT and mask_ptr is None):
            x = tl.load(x_ptr + offsets, mask=mask, other=0, eviction_policy=EVICTION)
            x_centred = x.to(ACC) - mean
        residual_centred = None
        if residual_mean_ptr is not None:
            residual = tl.load(residual_ptr + offsets, mask=mask, other=0, eviction_policy=EVICTION)
            residual_centred = residual.to(ACC) - residual_mean
        dz = _pre_activation_grad(
            dy_ptr, dy_skip_ptr, mask_ptr, residual_ptr, x_centred, scale, shift, residual_centred,
            residual_scale, param, row, col_block, count, C, L, ACT_GRAD, HAS_ACT, TILE, UNROLL,
            EVICTION, ACC,
        )  # fmt: skip
        if dresidual_ptr is not None and residual_mean_ptr is None:
            dtype: tl.constexpr = dresidual_ptr.dtype.element_ty
            tl.store(dresidual_ptr + offsets, round_to(dz, dtype), mask=mask)
        dx, dresidual = dz, dz
        if sum_dy_ptr is not None:
            dx = dz - mean_dy - x_centred * slope
            if residual_mean_ptr is not None:
                dresidual = dz - mean_dy - residual_centred * residual_slope
        tl.store(dx_ptr + offsets, round_to(dx * scale, dx_ptr.dtype.element_ty), mask=mask)
        if dresidual_ptr is not None and residual_mean_ptr is not None:
            dresidual = round_to(dresidual * residual_scale, dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + offsets, dresidual, mask=mask)


def bn_backward_reduce(
    dy: Tensor,
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    mask: Tensor | None,
    act: str,
    act_param: float,
    *,
    dy_skip: Tensor | None = None,
    write_dz: bool = False,
    out: tuple[Sums, Tensor | None] | None = None,
) -> tuple[Sums, Tensor | None]:
    """Σ dz and, of each norm, Σ dz·xhat of each channel, (C,) in fp32 (or fp64); dz if asked.

    ``dy``, ``dy_skip`` and ``residual`` are stored in memory as ``x`` is. dz = (dy + dy_skip)·act'(z):
    act'(z) comes from ``mask`` if there is one, else from z made again of ``x`` and ``residual``.
    ``out`` is (sums, dz), allocated by the caller.
    """
    planes = 2 if residual_norm is None else 3
    sums, dz = out or (
        Sums(*empty_channels(x, 2 if residual_norm is None else 4)), torch.empty_like(x) if write_dz else None
    )  # fmt: skip
    if x.numel() == 0:
        for each in sums:
            if each is not None:
                each.zero_()
        return sums, dz
    reduce = plan("reduce" if residual_norm is None else "reduce_two_norms", x)
    norms = pointers(norm, residual_norm)
    partial = torch.empty((planes, reduce.splits, x.shape[1]), dtype=sums.dy.dtype, device=x.device)
    launch(
        _bn_bwd_reduce_kernel,
        reduce,
        partial_ptr=partial,
        dz_ptr=dz,
        dy_ptr=dy,
        dy_skip_ptr=dy_skip,
        x_ptr=x,
        mask_ptr=mask,
        residual_ptr=residual,
        **norms,
        act_param=act_param,
        ACT_GRAD=ACTIVATIONS[act].grad,
        HAS_ACT=act != "identity",
    )
    launch(
        _bn_bwd_finalize_kernel,
        reduce.finalize,
        sum_dy_ptr=sums.dy,
        sum_dy_xhat_ptr=sums.dy_xhat,
        residual_sum_dy_ptr=sums.residual_dy,
        residual_sum_dy_xhat_ptr=sums.residual_dy_xhat,
        partial_ptr=partial,
        rstd_ptr=norms["rstd_ptr"],
        residual_rstd_ptr=norms.get("residual_rstd_ptr"),
    )
    return sums, dz


def bn_backward_dx(
    dy: Tensor,
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    mask: Tensor | None,
    act: str,
    act_param: float,
    sums: Sums | None,
    count: int,
    *,
    dy_skip: Tensor | None = None,
    write_dresidual: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx and, if asked, dresidual: dz, or with a ``residual_norm`` the gradient through that.

    ``sums`` are those of `bn_backward_reduce` over ``count`` elements a channel; None stands for
    eval mode, where the statistics are constants. ``out`` is (dx, dresidual), allocated by the
    caller.
    """
    dx, dresidual = out or (torch.empty_like(x), torch.empty_like(x) if write_dresidual else None)
    if x.numel() == 0:
        return dx, dresidual
    launch(
        _bn_bwd_dx_kernel,
        plan("dx" if residual_norm is None else "dx_two_norms", x),
        dx_ptr=dx,
        dresidual_ptr=dresidual,
        dy_ptr=dy,
        dy_skip_ptr=dy_skip,
        x_ptr=x,
        mask_ptr=mask,
        residual_ptr=residual,
        **pointers(norm, residual_norm),
        sum_dy_ptr=None if sums is None else sums.dy,
        sum_dy_xhat_ptr=None if sums is None else sums.dy_xhat,
        residual_sum_dy_xhat_ptr=None if sums is None else sums.residual_dy_xhat,
        act_param=act_param,
        stats_count=count,
        ACT_GRAD=ACTIVATIONS[act].grad,
        HAS_ACT=act != "identity",
    )
    return dx, dresidual
