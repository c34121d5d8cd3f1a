"""Batch norm backward: reduce -> finalize -> dx, and their launchers.

Both passes need dz = dy·act'(z), the gradient of the pre-activation. They take it from where
fewest bytes are read (`GRAD_FROM_*`); y is never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.bn_forward import _sum_splits
from bnres.kernels.config import next_power_of_2
from bnres.kernels.device import ACTIVATIONS, round_to
from bnres.kernels.dtypes import acc_type
from bnres.kernels.launch import ACC_DTYPE, FINALIZE, launch, launch_scope, plan
from bnres.kernels.norm import Norm, Sums
from bnres.kernels.outputs import empty_sums
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
def load_dy(
    dy_ptr,
    dy_skip_ptr,
    offsets,
    mask,
    HAS_DY_SKIP: tl.constexpr,
    ACC: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """The gradient of a tile of y, or the sum of both gradients where y was returned twice."""
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0, eviction_policy=EVICTION).to(ACC)
    if HAS_DY_SKIP:
        dy += tl.load(dy_skip_ptr + offsets, mask=mask, other=0, eviction_policy=EVICTION).to(ACC)
    return dy


@triton.jit
def _pre_activation_grad(
    dy_ptr,
    dy_skip_ptr,
    mask_ptr,
    residual_ptr,
    x_centred,
    scale,
    bias,
    param,
    row,
    col_block,
    count,
    C,
    L,
    ACT_GRAD: tl.constexpr,
    HAS_ACT: tl.constexpr,
    HAS_DY_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    EVICTION: tl.constexpr,
    ACC: tl.constexpr,
):
    """dz = (dy + dy_skip)·act'(z) of a tile, from the bit mask or from z made again as the forward made it."""
    offsets, mask = tile_offsets(row, col_block, count, C, L, TILE, UNROLL)
    dz = load_dy(dy_ptr, dy_skip_ptr, offsets, mask, HAS_DY_SKIP, ACC, EVICTION)
    if HAS_MASK:
        bit_offsets, bit_mask = mask_offsets(row, col_block, count, C, L, TILE, UNROLL)
        packed = tl.load(mask_ptr + bit_offsets, mask=bit_mask, other=0)
        dz = tl.where(unpack_bits(packed, TILE, UNROLL), dz, 0.0)
    elif HAS_ACT:
        z = x_centred * scale
        if HAS_BIAS:
            z += bias
        if HAS_RESIDUAL:
            z += tl.load(residual_ptr + offsets, mask=mask, other=0).to(ACC)
        dz = ACT_GRAD(dz, z, param)
    return tl.where(mask, dz, 0.0)


@triton.jit
def _bn_bwd_reduce_kernel(
    partial_ptr,
    dz_ptr,
    dy_ptr,
    dy_skip_ptr,
    x_ptr,
    mask_ptr,
    residual_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    count,
    C,
    L,
    rows_per_split,
    act_param: tl.float64,
    ACT_GRAD: tl.constexpr,
    HAS_ACT: tl.constexpr,
    HAS_DY_SKIP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    EVICTION: tl.constexpr,
    INNER_POW2: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums of dz and of dz·(x − mean) over a split's rows: partial is (2, splits, C)."""
    col_block, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    mean = to_columns(tl.load(mean_ptr + offs_c, mask=mask_c, other=0).to(ACC), TILE)
    scale, bias = mean, mean
    if HAS_ACT and not HAS_MASK:
        scale = tl.load(rstd_ptr + offs_c, mask=mask_c, other=1).to(ACC)
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0).to(ACC)
        scale = to_columns(scale, TILE)
        if HAS_BIAS:
            bias = to_columns(tl.load(bias_ptr + offs_c, mask=mask_c, other=0).to(ACC), TILE)
    param = tl.full((), act_param, ACC)
    sum_dz = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    sum_dz_xmu = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    for row in tl.range(start, stop, UNROLL * TILE.sub_rows, num_stages=STAGES):
        offsets, mask = tile_offsets(row, col_block, count, C, L, TILE, UNROLL)
        x = tl.load(x_ptr + offsets, mask=mask, other=0, eviction_policy=EVICTION)
        x_centred = x.to(ACC) - mean
        dz = _pre_activation_grad(
            dy_ptr, dy_skip_ptr, mask_ptr, residual_ptr, x_centred, scale, bias, param, row,
            col_block, count, C, L, ACT_GRAD, HAS_ACT, HAS_DY_SKIP, HAS_BIAS, HAS_MASK,
            HAS_RESIDUAL, TILE, UNROLL, EVICTION, ACC,
        )  # fmt: skip
        if WRITE_DZ:
            tl.store(dz_ptr + offsets, round_to(dz, dz_ptr.dtype.element_ty), mask=mask)
        sum_dz += fold(dz, TILE, UNROLL)
        sum_dz_xmu += fold(dz * x_centred, TILE, UNROLL)
    out = partial_ptr + tl.cast(split, tl.int64) * C + offs_c
    tl.store(out, to_channels(sum_dz, TILE, INNER_POW2), mask=mask_c)
    tl.store(
        out + tl.cast(splits, tl.int64) * C, to_channels(sum_dz_xmu, TILE, INNER_POW2), mask=mask_c
    )


@triton.jit
def _bn_bwd_finalize_kernel(
    sum_dy_ptr,
    sum_dy_xhat_ptr,
    partial_ptr,
    rstd_ptr,
    C,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sum_dy and sum_dy_xhat = rstd·sum(dz·(x − mean)) of each channel: (C,)."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    sum_dy = _sum_splits(partial_ptr, splits, offs_c, mask_c, C, BLOCK_S, BLOCK_C)
    xmu_ptr = partial_ptr + tl.cast(splits, tl.int64) * C
    sum_dy_xmu = _sum_splits(xmu_ptr, splits, offs_c, mask_c, C, BLOCK_S, BLOCK_C)
    sum_dy_xhat = sum_dy_xmu * tl.load(rstd_ptr + offs_c, mask=mask_c, other=0).to(tl.float64)
    tl.store(sum_dy_ptr + offs_c, sum_dy.to(sum_dy_ptr.dtype.element_ty), mask=mask_c)
    tl.store(
        sum_dy_xhat_ptr + offs_c, sum_dy_xhat.to(sum_dy_xhat_ptr.dtype.element_ty), mask=mask_c
    )


@triton.jit
def _bn_bwd_dx_kernel(
    dx_ptr,
    dz_ptr,
    dy_ptr,
    dy_skip_ptr,
    x_ptr,
    mask_ptr,
    residual_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    sum_dy_ptr,
    sum_dy_xhat_ptr,
    count,
    C,
    L,
    rows_per_split,
    act_param: tl.float64,
    stats_count,
    ACT_GRAD: tl.constexpr,
    TRAINING: tl.constexpr,
    HAS_ACT: tl.constexpr,
    HAS_DY_SKIP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    EVICTION: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx = (dz − (sum_dy + xhat·sum_dy_xhat)/count)·(rstd·weight); in eval mode dz·(rstd·weight)."""
    col_block, split = tl.program_id(0), tl.program_id(1)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0).to(ACC)
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=1).to(ACC)
    scale = rstd
    if HAS_WEIGHT:
        scale *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0).to(ACC)
    if TRAINING:
        inv_n = (1 / tl.cast(stats_count, tl.float64)).to(ACC)
        mean_dy = tl.load(sum_dy_ptr + offs_c, mask=mask_c, other=0).to(ACC) * inv_n
        slope = tl.load(sum_dy_xhat_ptr + offs_c, mask=mask_c, other=0).to(ACC) * inv_n * rstd
        mean_dy, slope = to_columns(mean_dy, TILE), to_columns(slope, TILE)
    mean, scale = to_columns(mean, TILE), to_columns(scale, TILE)
    bias = mean
    if HAS_ACT and not HAS_MASK and HAS_BIAS:
        bias = to_columns(tl.load(bias_ptr + offs_c, mask=mask_c, other=0).to(ACC), TILE)
    param = tl.full((), act_param, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    for row in tl.range(start, stop, UNROLL * TILE.sub_rows, num_stages=STAGES):
        offsets, mask = tile_offsets(row, col_block, count, C, L, TILE, UNROLL)
        x_centred = mean
        if TRAINING or (HAS_ACT and not HAS_MASK):
            x = tl.load(x_ptr + offsets, mask=mask, other=0, eviction_policy=EVICTION)
            x_centred = x.to(ACC) - mean
        dz = _pre_activation_grad(
            dy_ptr, dy_skip_ptr, mask_ptr, residual_ptr, x_centred, scale, bias, param, row,
            col_block, count, C, L, ACT_GRAD, HAS_ACT, HAS_DY_SKIP, HAS_BIAS, HAS_MASK,
            HAS_RESIDUAL, TILE, UNROLL, EVICTION, ACC,
        )  # fmt: skip
        if WRITE_DZ:
            tl.store(dz_ptr + offsets, round_to(dz, dz_ptr.dtype.element_ty), mask=mask)
        dx = dz
        if TRAINING:
            dx = dz - mean_dy - x_centred * slope
        tl.store(dx_ptr + offsets, round_to(dx * scale, dx_ptr.dtype.element_ty), mask=mask)


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
    """Σ dz and Σ dz·xhat of each channel, (C,) in fp32 (or fp64), and dz itself if asked.

    ``dy``, ``dy_skip`` and ``residual`` are stored in memory as ``x`` is. dz = (dy + dy_skip)·act'(z):
    act'(z) comes from ``mask`` if there is one, else from z made again of ``x`` and ``residual``.
    ``out`` is (sums, dz), allocated by the caller.
    """
    sums, dz = out or (
        empty_sums(x, residual_norm is not None),
        torch.empty_like(x) if write_dz else None,
    )
    if x.numel() == 0:
        for each in sums:
            if each is not None:
                each.zero_()
        return sums, dz
    if residual is not None and residual_norm is not None:
        from bnres.kernels.bn_dual import bn_dual_backward_reduce

        bn_dual_backward_reduce(sums, dy, dy_skip, x, residual, norm, residual_norm, act, act_param)
        return sums, dz
    acc, channels = acc_type(x), x.shape[1]
    view, tile, config = plan("reduce", x)
    partial = torch.empty((2, config.splits, channels), dtype=acc, device=x.device)
    with launch_scope(x):
        launch(
            _bn_bwd_reduce_kernel,
            config.grid,
            partial_ptr=partial,
            dz_ptr=dz,
            dy_ptr=dy,
            dy_skip_ptr=dy_skip,
            x_ptr=x,
            mask_ptr=mask,
            residual_ptr=residual,
            mean_ptr=norm.statistics.mean,
            rstd_ptr=norm.statistics[1],
            weight_ptr=norm.weight,
            bias_ptr=norm.bias,
            count=view.count,
            C=channels,
            L=view.inner,
            rows_per_split=config.rows_per_split,
            act_param=act_param,
            ACT_GRAD=ACTIVATIONS[act].grad,
            HAS_ACT=act != "identity",
            HAS_DY_SKIP=dy_skip is not None,
            HAS_WEIGHT=norm.weight is not None,
            HAS_BIAS=norm.bias is not None,
            HAS_MASK=mask is not None,
            HAS_RESIDUAL=residual is not None,
            WRITE_DZ=dz is not None,
            TILE=tile,
            UNROLL=config.unroll,
            STAGES=config.num_stages,
            EVICTION=config.eviction,
            INNER_POW2=next_power_of_2(tile.group_inner),
            ACC=ACC_DTYPE[acc],
        )
        launch(
            _bn_bwd_finalize_kernel,
            FINALIZE.grid(channels),
            sum_dy_ptr=sums.dy,
            sum_dy_xhat_ptr=sums.dy_xhat,
            partial_ptr=partial,
            rstd_ptr=norm.statistics[1],
            C=channels,
            splits=config.splits,
            BLOCK_S=FINALIZE.block_splits,
            BLOCK_C=FINALIZE.block_channels,
            num_warps=FINALIZE.num_warps,
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
    dx, dresidual = out or (
        torch.empty_like(x),
        torch.empty_like(x) if write_dresidual else None,
    )
    if x.numel() == 0:
        return dx, dresidual
    if residual is not None and residual_norm is not None:
        from bnres.kernels.bn_dual import bn_dual_backward_dx

        bn_dual_backward_dx(
            dx, torch.empty_like(x) if dresidual is None else dresidual, dy, dy_skip, x, residual,
            norm, residual_norm, act, act_param, sums, count,
        )  # fmt: skip
        return dx, dresidual
    view, tile, config = plan("dx", x)
    with launch_scope(x):
        launch(
            _bn_bwd_dx_kernel,
            config.grid,
            dx_ptr=dx,
            dz_ptr=dresidual,
            dy_ptr=dy,
            dy_skip_ptr=dy_skip,
            x_ptr=x,
            mask_ptr=mask,
            residual_ptr=residual,
            mean_ptr=norm.statistics.mean,
            rstd_ptr=norm.statistics[1],
            weight_ptr=norm.weight,
            bias_ptr=norm.bias,
            sum_dy_ptr=None if sums is None else sums.dy,
            sum_dy_xhat_ptr=None if sums is None else sums.dy_xhat,
            count=view.count,
            C=view.channels,
            L=view.inner,
            rows_per_split=config.rows_per_split,
            act_param=act_param,
            stats_count=count,
            ACT_GRAD=ACTIVATIONS[act].grad,
            TRAINING=sums is not None,
            HAS_ACT=act != "identity",
            HAS_DY_SKIP=dy_skip is not None,
            HAS_WEIGHT=norm.weight is not None,
            HAS_BIAS=norm.bias is not None,
            HAS_MASK=mask is not None,
            HAS_RESIDUAL=residual is not None,
            WRITE_DZ=dresidual is not None,
            TILE=tile,
            UNROLL=config.unroll,
            STAGES=config.num_stages,
            EVICTION=config.eviction,
            ACC=ACC_DTYPE[acc_type(x)],
        )
    return dx, dresidual
