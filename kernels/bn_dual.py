"""y = act(bn_a(x_a) + bn_b(x_b)), the end of a down-sampling block: apply, reduce -> finalize -> dx.

The statistics are those of `bn_forward.bn_stats`. Backward makes z again from both inputs, which
it reads anyway, so no mask is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.bn_backward import load_dy
from bnres.kernels.bn_forward import _sum_splits
from bnres.kernels.config import next_power_of_2
from bnres.kernels.device import ACTIVATIONS, round_to
from bnres.kernels.dtypes import acc_type
from bnres.kernels.launch import ACC_DTYPE, FINALIZE, launch, launch_scope, plan
from bnres.kernels.norm import Norm, RunningStatistics, Sums
from bnres.kernels.tiles import (
    channel_ids,
    fold,
    split_rows,
    tile_offsets,
    to_channels,
    to_columns,
)


@triton.jit
def _mean_and_scale(
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    eps,
    offs_c,
    mask_c,
    FROM_VAR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """mean and rstd·weight of a column block, broadcastable to a tile."""
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0).to(ACC)
    scale = tl.load(rstd_ptr + offs_c, mask=mask_c, other=1).to(ACC)
    if FROM_VAR:
        scale = tl.rsqrt(scale + tl.full((), eps, ACC))
    if HAS_WEIGHT:
        scale *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0).to(ACC)
    return to_columns(mean, TILE), to_columns(scale, TILE)


@triton.jit
def _shift(
    bias_a_ptr,
    bias_b_ptr,
    offs_c,
    mask_c,
    HAS_BIAS_A: tl.constexpr,
    HAS_BIAS_B: tl.constexpr,
    TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """bias_a + bias_b of a column block, broadcastable to a tile."""
    shift = tl.full((TILE.block_channels,), 0.0, ACC)
    if HAS_BIAS_A:
        shift += tl.load(bias_a_ptr + offs_c, mask=mask_c, other=0).to(ACC)
    if HAS_BIAS_B:
        shift += tl.load(bias_b_ptr + offs_c, mask=mask_c, other=0).to(ACC)
    return to_columns(shift, TILE)


@triton.jit
def _bn_dual_apply_kernel(
    y_ptr,
    x_a_ptr,
    x_b_ptr,
    mean_a_ptr,
    rstd_a_ptr,
    weight_a_ptr,
    bias_a_ptr,
    mean_b_ptr,
    rstd_b_ptr,
    weight_b_ptr,
    bias_b_ptr,
    count,
    C,
    L,
    rows_per_split,
    act_param: tl.float64,
    eps_a: tl.float64,
    eps_b: tl.float64,
    ACT: tl.constexpr,
    FROM_VAR: tl.constexpr,
    HAS_WEIGHT_A: tl.constexpr,
    HAS_BIAS_A: tl.constexpr,
    HAS_WEIGHT_B: tl.constexpr,
    HAS_BIAS_B: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """y = act((x_a − mean_a)·scale_a + (x_b − mean_b)·scale_b + shift), scale = rstd·weight."""
    col_block, split = tl.program_id(0), tl.program_id(1)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    mean_a, scale_a = _mean_and_scale(
        mean_a_ptr, rstd_a_ptr, weight_a_ptr, eps_a, offs_c, mask_c, FROM_VAR, HAS_WEIGHT_A, TILE,
        ACC,
    )  # fmt: skip
    mean_b, scale_b = _mean_and_scale(
        mean_b_ptr, rstd_b_ptr, weight_b_ptr, eps_b, offs_c, mask_c, FROM_VAR, HAS_WEIGHT_B, TILE,
        ACC,
    )  # fmt: skip
    shift = _shift(bias_a_ptr, bias_b_ptr, offs_c, mask_c, HAS_BIAS_A, HAS_BIAS_B, TILE, ACC)
    param = tl.full((), act_param, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    for row in tl.range(start, stop, UNROLL * TILE.sub_rows, num_stages=STAGES):
        offsets, mask = tile_offsets(row, col_block, count, C, L, TILE, UNROLL)
        x_a = tl.load(x_a_ptr + offsets, mask=mask, other=0).to(ACC)
        x_b = tl.load(x_b_ptr + offsets, mask=mask, other=0).to(ACC)
        z = (x_a - mean_a) * scale_a + (x_b - mean_b) * scale_b + shift
        tl.store(y_ptr + offsets, round_to(ACT(z, param), y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bn_dual_bwd_reduce_kernel(
    partial_ptr,
    dy_ptr,
    dy_skip_ptr,
    x_a_ptr,
    x_b_ptr,
    mean_a_ptr,
    rstd_a_ptr,
    weight_a_ptr,
    bias_a_ptr,
    mean_b_ptr,
    rstd_b_ptr,
    weight_b_ptr,
    bias_b_ptr,
    count,
    C,
    L,
    rows_per_split,
    act_param: tl.float64,
    ACT_GRAD: tl.constexpr,
    HAS_DY_SKIP: tl.constexpr,
    HAS_WEIGHT_A: tl.constexpr,
    HAS_BIAS_A: tl.constexpr,
    HAS_WEIGHT_B: tl.constexpr,
    HAS_BIAS_B: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    INNER_POW2: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums of dz, dz·(x_a − mean_a), dz·(x_b − mean_b) over a split: partial is (3, splits, C)."""
    col_block, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    mean_a, scale_a = _mean_and_scale(
        mean_a_ptr, rstd_a_ptr, weight_a_ptr, 0.0, offs_c, mask_c, False, HAS_WEIGHT_A, TILE, ACC
    )
    mean_b, scale_b = _mean_and_scale(
        mean_b_ptr, rstd_b_ptr, weight_b_ptr, 0.0, offs_c, mask_c, False, HAS_WEIGHT_B, TILE, ACC
    )
    shift = _shift(bias_a_ptr, bias_b_ptr, offs_c, mask_c, HAS_BIAS_A, HAS_BIAS_B, TILE, ACC)
    param = tl.full((), act_param, ACC)
    sum_dz = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    sum_a = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    sum_b = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    for row in tl.range(start, stop, UNROLL * TILE.sub_rows, num_stages=STAGES):
        offsets, mask = tile_offsets(row, col_block, count, C, L, TILE, UNROLL)
        x_a = tl.load(x_a_ptr + offsets, mask=mask, other=0).to(ACC) - mean_a
        x_b = tl.load(x_b_ptr + offsets, mask=mask, other=0).to(ACC) - mean_b
        dy = load_dy(dy_ptr, dy_skip_ptr, offsets, mask, HAS_DY_SKIP, ACC, "")
        dz = ACT_GRAD(dy, x_a * scale_a + x_b * scale_b + shift, param)
        dz = tl.where(mask, dz, 0.0)
        sum_dz += fold(dz, TILE, UNROLL)
        sum_a += fold(dz * x_a, TILE, UNROLL)
        sum_b += fold(dz * x_b, TILE, UNROLL)
    out = partial_ptr + tl.cast(split, tl.int64) * C + offs_c
    plane = tl.cast(splits, tl.int64) * C
    tl.store(out, to_channels(sum_dz, TILE, INNER_POW2), mask=mask_c)
    tl.store(out + plane, to_channels(sum_a, TILE, INNER_POW2), mask=mask_c)
    tl.store(out + 2 * plane, to_channels(sum_b, TILE, INNER_POW2), mask=mask_c)


@triton.jit
def _bn_dual_bwd_finalize_kernel(
    sum_dy_ptr,
    sum_dy_xhat_a_ptr,
    sum_dy_xhat_b_ptr,
    partial_ptr,
    rstd_a_ptr,
    rstd_b_ptr,
    C,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sum_dy and, of both inputs, sum_dy_xhat = rstd·sum(dz·(x − mean)) of each channel: (C,)."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    plane = tl.cast(splits, tl.int64) * C
    sum_dy = _sum_splits(partial_ptr, splits, offs_c, mask_c, C, BLOCK_S, BLOCK_C)
    sum_a = _sum_splits(partial_ptr + plane, splits, offs_c, mask_c, C, BLOCK_S, BLOCK_C)
    sum_b = _sum_splits(partial_ptr + 2 * plane, splits, offs_c, mask_c, C, BLOCK_S, BLOCK_C)
    sum_a *= tl.load(rstd_a_ptr + offs_c, mask=mask_c, other=0).to(tl.float64)
    sum_b *= tl.load(rstd_b_ptr + offs_c, mask=mask_c, other=0).to(tl.float64)
    tl.store(sum_dy_ptr + offs_c, sum_dy.to(sum_dy_ptr.dtype.element_ty), mask=mask_c)
    tl.store(sum_dy_xhat_a_ptr + offs_c, sum_a.to(sum_dy_ptr.dtype.element_ty), mask=mask_c)
    tl.store(sum_dy_xhat_b_ptr + offs_c, sum_b.to(sum_dy_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _bn_dual_bwd_dx_kernel(
    dx_a_ptr,
    dx_b_ptr,
    dy_ptr,
    dy_skip_ptr,
    x_a_ptr,
    x_b_ptr,
    mean_a_ptr,
    rstd_a_ptr,
    weight_a_ptr,
    bias_a_ptr,
    mean_b_ptr,
    rstd_b_ptr,
    weight_b_ptr,
    bias_b_ptr,
    sum_dy_ptr,
    sum_dy_xhat_a_ptr,
    sum_dy_xhat_b_ptr,
    count,
    C,
    L,
    rows_per_split,
    act_param: tl.float64,
    stats_count,
    ACT_GRAD: tl.constexpr,
    TRAINING: tl.constexpr,
    HAS_DY_SKIP: tl.constexpr,
    HAS_WEIGHT_A: tl.constexpr,
    HAS_BIAS_A: tl.constexpr,
    HAS_WEIGHT_B: tl.constexpr,
    HAS_BIAS_B: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx of both inputs: (dz − (sum_dy + xhat·sum_dy_xhat)/count)·scale; in eval mode dz·scale."""
    col_block, split = tl.program_id(0), tl.program_id(1)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    mean_a, scale_a = _mean_and_scale(
        mean_a_ptr, rstd_a_ptr, weight_a_ptr, 0.0, offs_c, mask_c, False, HAS_WEIGHT_A, TILE, ACC
    )
    mean_b, scale_b = _mean_and_scale(
        mean_b_ptr, rstd_b_ptr, weight_b_ptr, 0.0, offs_c, mask_c, False, HAS_WEIGHT_B, TILE, ACC
    )
    shift = _shift(bias_a_ptr, bias_b_ptr, offs_c, mask_c, HAS_BIAS_A, HAS_BIAS_B, TILE, ACC)
    if TRAINING:
        inv_n = (1 / tl.cast(stats_count, tl.float64)).to(ACC)
        mean_dy = tl.load(sum_dy_ptr + offs_c, mask=mask_c, other=0).to(ACC) * inv_n
        slope_a = tl.load(sum_dy_xhat_a_ptr + offs_c, mask=mask_c, other=0).to(ACC) * inv_n
        slope_a *= tl.load(rstd_a_ptr + offs_c, mask=mask_c, other=0).to(ACC)
        slope_b = tl.load(sum_dy_xhat_b_ptr + offs_c, mask=mask_c, other=0).to(ACC) * inv_n
        slope_b *= tl.load(rstd_b_ptr + offs_c, mask=mask_c, other=0).to(ACC)
        mean_dy = to_columns(mean_dy, TILE)
        slope_a, slope_b = to_columns(slope_a, TILE), to_columns(slope_b, TILE)
    param = tl.full((), act_param, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    for row in tl.range(start, stop, UNROLL * TILE.sub_rows, num_stages=STAGES):
        offsets, mask = tile_offsets(row, col_block, count, C, L, TILE, UNROLL)
        x_a = tl.load(x_a_ptr + offsets, mask=mask, other=0).to(ACC) - mean_a
        x_b = tl.load(x_b_ptr + offsets, mask=mask, other=0).to(ACC) - mean_b
        dy = load_dy(dy_ptr, dy_skip_ptr, offsets, mask, HAS_DY_SKIP, ACC, "")
        dz = ACT_GRAD(dy, x_a * scale_a + x_b * scale_b + shift, param)
        dx_a, dx_b = dz, dz
        if TRAINING:
            dz -= mean_dy
            dx_a = dz - x_a * slope_a
            dx_b = dz - x_b * slope_b
        tl.store(dx_a_ptr + offsets, round_to(dx_a * scale_a, dx_a_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_b_ptr + offsets, round_to(dx_b * scale_b, dx_b_ptr.dtype.element_ty), mask=mask)


def _norm_arguments(norm_a: Norm, norm_b: Norm) -> dict[str, object]:
    """The kernels' arguments that both batch norms' tensors are."""
    arguments: dict[str, object] = {}
    for side, norm in (("a", norm_a), ("b", norm_b)):
        arguments[f"mean_{side}_ptr"], arguments[f"rstd_{side}_ptr"] = norm.statistics[:2]
        arguments[f"weight_{side}_ptr"], arguments[f"bias_{side}_ptr"] = norm.weight, norm.bias
        arguments[f"HAS_WEIGHT_{side.upper()}"] = norm.weight is not None
        arguments[f"HAS_BIAS_{side.upper()}"] = norm.bias is not None
    return arguments


def bn_dual_apply(
    y: Tensor,
    x_a: Tensor,
    x_b: Tensor,
    norm_a: Norm,
    norm_b: Norm,
    act: str,
    act_param: float,
) -> None:
    """``act(bn_a(x_a) + bn_b(x_b))`` of two tensors that are stored in memory alike, to ``y``."""
    eps = [
        n.statistics.eps if isinstance(n.statistics, RunningStatistics) else 0.0
        for n in (norm_a, norm_b)
    ]
    view, tile, config = plan("dual_apply", x_a)
    with launch_scope(x_a):
        launch(
            _bn_dual_apply_kernel,
            config.grid,
            y_ptr=y,
            x_a_ptr=x_a,
            x_b_ptr=x_b,
            **_norm_arguments(norm_a, norm_b),
            count=view.count,
            C=view.channels,
            L=view.inner,
            rows_per_split=config.rows_per_split,
            act_param=act_param,
            eps_a=eps[0],
            eps_b=eps[1],
            ACT=ACTIVATIONS[act].forward,
            FROM_VAR=isinstance(norm_a.statistics, RunningStatistics),
            TILE=tile,
            UNROLL=config.unroll,
            STAGES=config.num_stages,
            ACC=ACC_DTYPE[acc_type(x_a)],
        )


def bn_dual_backward_reduce(
    sums: Sums,
    dy: Tensor,
    dy_skip: Tensor | None,
    x_a: Tensor,
    x_b: Tensor,
    norm_a: Norm,
    norm_b: Norm,
    act: str,
    act_param: float,
) -> None:
    """sum(dz), sum(dz·xhat_a) and sum(dz·xhat_b) of each channel, to ``sums``."""
    acc, channels = acc_type(x_a), x_a.shape[1]
    view, tile, config = plan("dual_reduce", x_a)
    partial = torch.empty((3, config.splits, channels), dtype=acc, device=x_a.device)
    with launch_scope(x_a):
        launch(
            _bn_dual_bwd_reduce_kernel,
            config.grid,
            partial_ptr=partial,
            dy_ptr=dy,
            dy_skip_ptr=dy_skip,
            x_a_ptr=x_a,
            x_b_ptr=x_b,
            **_norm_arguments(norm_a, norm_b),
            count=view.count,
            C=channels,
            L=view.inner,
            rows_per_split=config.rows_per_split,
            act_param=act_param,
            ACT_GRAD=ACTIVATIONS[act].grad,
            HAS_DY_SKIP=dy_skip is not None,
            TILE=tile,
            UNROLL=config.unroll,
            STAGES=config.num_stages,
            INNER_POW2=next_power_of_2(tile.group_inner),
            ACC=ACC_DTYPE[acc],
        )
        launch(
            _bn_dual_bwd_finalize_kernel,
            FINALIZE.grid(channels),
            sum_dy_ptr=sums.dy,
            sum_dy_xhat_a_ptr=sums.dy_xhat,
            sum_dy_xhat_b_ptr=sums.residual_dy_xhat,
            partial_ptr=partial,
            rstd_a_ptr=norm_a.statistics[1],
            rstd_b_ptr=norm_b.statistics[1],
            C=channels,
            splits=config.splits,
            BLOCK_S=FINALIZE.block_splits,
            BLOCK_C=FINALIZE.block_channels,
            num_warps=FINALIZE.num_warps,
        )


def bn_dual_backward_dx(
    dx_a: Tensor,
    dx_b: Tensor,
    dy: Tensor,
    dy_skip: Tensor | None,
    x_a: Tensor,
    x_b: Tensor,
    norm_a: Norm,
    norm_b: Norm,
    act: str,
    act_param: float,
    sums: Sums | None,
    count: int,
) -> None:
    """The gradients of both inputs, to ``dx_a`` and ``dx_b``."""
    view, tile, config = plan("dual_dx", x_a)
    sum_dy, sum_dy_xhat_a, sum_dy_xhat_b = (None, None, None) if sums is None else sums
    with launch_scope(x_a):
        launch(
            _bn_dual_bwd_dx_kernel,
            config.grid,
            dx_a_ptr=dx_a,
            dx_b_ptr=dx_b,
            dy_ptr=dy,
            dy_skip_ptr=dy_skip,
            x_a_ptr=x_a,
            x_b_ptr=x_b,
            **_norm_arguments(norm_a, norm_b),
            sum_dy_ptr=sum_dy,
            sum_dy_xhat_a_ptr=sum_dy_xhat_a,
            sum_dy_xhat_b_ptr=sum_dy_xhat_b,
            count=view.count,
            C=view.channels,
            L=view.inner,
            rows_per_split=config.rows_per_split,
            act_param=act_param,
            stats_count=count,
            ACT_GRAD=ACTIVATIONS[act].grad,
            TRAINING=sums is not None,
            HAS_DY_SKIP=dy_skip is not None,
            TILE=tile,
            UNROLL=config.unroll,
            STAGES=config.num_stages,
            ACC=ACC_DTYPE[acc_type(x_a)],
        )
