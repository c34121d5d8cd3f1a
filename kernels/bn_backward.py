"""The three kernels of batch norm's backward pass, and their launchers.

The elements of each channel are divided among programs. The part of one program is called a split.

- The reduce kernel computes the sums of each split.
- The finalize kernel adds the sums of all splits.
- The dx kernel computes the gradients of x and of the residual.

`bnres.kernels.tiles` explains tiles and sub-tiles.

The reduce and dx kernels need dz = (dy + dy_skip)·act'(z), the gradient of the activation's input
z. dy is the gradient of y. If forward returned y twice, dy_skip is the gradient of the second y,
otherwise dy_skip is None. If forward saved a mask, act'(z) is the element's bit in the mask.
Otherwise act'(z) is computed from z, which is recomputed from x and the residual. The kernels never
read y.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.channels import FINALIZE_CHANNELS, add_splits, load_line, load_norms
from bnres.kernels.device import ACTIVATIONS, identity_grad
from bnres.kernels.launch import launch, plan
from bnres.kernels.norm import Norm, Sums, pointers
from bnres.kernels.outputs import empty_channels
from bnres.kernels.tiles import (
    channel_ids,
    load_mask,
    load_tile,
    split_rows,
    store_tile,
    tile_at,
    to_channels,
    unpack_bits,
    whole_rows,
)


@triton.jit
def _load_sub_tile(
    tensors, load_at, bits, norms, param,
    NEEDS_X: tl.constexpr, TWO_NORMS: tl.constexpr, ACT_GRAD: tl.constexpr, TILE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Returns dz, x − mean and residual − residual_mean of a sub-tile.

    In rows that don't exist, dz is 0, because dy is loaded as zero. x − mean is valid only with
    NEEDS_X. residual − residual_mean is valid only with TWO_NORMS, which means that the residual
    has its own batch norm.
    """
    dy_ptr, dy_skip_ptr, x_ptr, mask_ptr, residual_ptr = tensors
    norm, residual_norm, shift = norms
    x_centred, residual_centred = norm[0], residual_norm[0]
    if NEEDS_X:
        x_centred = load_tile(x_ptr, load_at, TILE, ACC) - norm[0]
    if TWO_NORMS:
        residual = load_tile(residual_ptr, load_at, TILE, ACC)
        residual_centred = residual - residual_norm[0]
    dz = load_tile(dy_ptr, load_at, TILE, ACC)
    if dy_skip_ptr is not None:
        dz += load_tile(dy_skip_ptr, load_at, TILE, ACC)
    if mask_ptr is not None:
        packed, u = bits
        dz = tl.where(unpack_bits(packed, u, TILE), dz, 0.0)
    elif ACT_GRAD is not identity_grad:
        z = x_centred * norm[2]
        if TWO_NORMS:
            z += residual_centred * residual_norm[2]
        z += shift
        if residual_ptr is not None and not TWO_NORMS:
            z += load_tile(residual_ptr, load_at, TILE, ACC)
        dz = ACT_GRAD(dz, z, param)
    return dz, x_centred, residual_centred


@triton.jit
def _reduce_sub_tile(
    sums, dz_ptr, tensors, bits, norms, param, row, col_block, shape,
    TWO_NORMS: tl.constexpr, ACT_GRAD: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Adds a sub-tile's dz, dz·(x − mean) and dz·(residual − residual_mean) to three sums.

    The third sum is computed only if the residual has its own batch norm.
    """
    load_at, at = tile_at(row, col_block, shape, TILE, 1, WHOLE)
    dz, x_centred, residual_centred = _load_sub_tile(
        tensors, load_at, bits, norms, param, True, TWO_NORMS, ACT_GRAD, TILE, ACC
    )
    if dz_ptr is not None:
        store_tile(dz_ptr, dz, at)
    sum_dz, sum_dz_xmu, sum_dz_rmu = sums
    if TWO_NORMS:
        sum_dz_rmu += dz * residual_centred
    return sum_dz + dz, sum_dz_xmu + dz * x_centred, sum_dz_rmu


@triton.jit
def _bn_bwd_reduce_kernel(
    partial_ptr, dz_ptr, dy_ptr, dy_skip_ptr, x_ptr, mask_ptr, residual_ptr,
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr,
    count, C, L, rows_per_split, act_param: tl.float64,
    ACT_GRAD: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Stores each channel's Σ dz, Σ dz·(x − mean) and Σ dz·(residual − residual_mean) over a split.

    A split is a range of rows. partial_ptr points to a tensor (3, splits, C), or (2, splits, C)
    without the third sum if the residual has no batch norm of its own. If dz_ptr is not None, dz is
    also stored.
    """
    TWO_NORMS: tl.constexpr = residual_mean_ptr is not None
    col_block, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    tensors, shape = (dy_ptr, dy_skip_ptr, x_ptr, mask_ptr, residual_ptr), (count, C, L)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    norms = load_norms(
        (mean_ptr, rstd_ptr, None, weight_ptr, bias_ptr),
        (residual_mean_ptr, residual_rstd_ptr, None, residual_weight_ptr, residual_bias_ptr),
        0.0, 0.0, offs_c, mask_c, TILE, ACC,
    )  # fmt: skip
    param = tl.full((), act_param, ACC)
    zeros = tl.full((TILE.sub_rows, TILE.block_cols), 0.0, ACC)
    sums = zeros, zeros, zeros
    start, stop = split_rows(split, rows_per_split, count, TILE)
    whole = whole_rows(start, stop, count, TILE, UNROLL)
    for row in tl.range(start, whole, UNROLL * TILE.sub_rows, num_stages=STAGES):
        packed = load_mask(mask_ptr, row, stop, col_block, shape, TILE, UNROLL)
        for u in tl.static_range(UNROLL):
            sums = _reduce_sub_tile(
                sums, dz_ptr, tensors, (packed, u), norms, param, row + u * TILE.sub_rows,
                col_block, shape, TWO_NORMS, ACT_GRAD, TILE, True, ACC,
            )  # fmt: skip
    packed = load_mask(mask_ptr, whole, stop, col_block, shape, TILE, UNROLL)
    for row in tl.range(whole, stop, TILE.sub_rows, num_stages=1):
        sums = _reduce_sub_tile(
            sums, dz_ptr, tensors, (packed, (row - whole) // TILE.sub_rows), norms, param, row,
            col_block, shape, TWO_NORMS, ACT_GRAD, TILE, False, ACC,
        )  # fmt: skip
    sum_dz, sum_dz_xmu, sum_dz_rmu = sums
    out = partial_ptr + tl.cast(split, tl.int64) * C + offs_c
    plane = tl.cast(splits, tl.int64) * C
    tl.store(out, to_channels(sum_dz, TILE), mask=mask_c)
    tl.store(out + plane, to_channels(sum_dz_xmu, TILE), mask=mask_c)
    if TWO_NORMS:
        tl.store(out + 2 * plane, to_channels(sum_dz_rmu, TILE), mask=mask_c)


@triton.jit
def _bn_bwd_finalize_kernel(
    sum_dy_ptr, sum_dy_xhat_ptr, residual_sum_dy_ptr, residual_sum_dy_xhat_ptr,
    partial_ptr, rstd_ptr, residual_rstd_ptr, C, splits, TRIPS: tl.constexpr,
):  # fmt: skip
    """Stores sum_dy = Σ dz and sum_dy_xhat = rstd·Σ dz·(x − mean) of each channel: (C,).

    If the residual has its own batch norm, the kernel also stores that batch norm's sums: the same
    sum_dy, and sum_dy_xhat computed from the residual.
    """
    offs_c = tl.program_id(0) * FINALIZE_CHANNELS + tl.arange(0, FINALIZE_CHANNELS)
    mask_c = offs_c < C
    plane = tl.cast(splits, tl.int64) * C
    dtype: tl.constexpr = sum_dy_ptr.dtype.element_ty
    # All loads come before the first `tl.sum`, because `tl.sum` has a barrier, which would delay
    # the loads after it.
    sum_dz = add_splits(partial_ptr, splits, offs_c, mask_c, C, TRIPS)
    sum_dz_xmu = add_splits(partial_ptr + plane, splits, offs_c, mask_c, C, TRIPS)
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0).to(tl.float64)
    if residual_rstd_ptr is not None:
        sum_dz_rmu = add_splits(partial_ptr + 2 * plane, splits, offs_c, mask_c, C, TRIPS)
        residual_rstd = tl.load(residual_rstd_ptr + offs_c, mask=mask_c, other=0).to(tl.float64)
    sum_dy = tl.sum(sum_dz, 0).to(dtype)
    tl.store(sum_dy_ptr + offs_c, sum_dy, mask=mask_c)
    tl.store(sum_dy_xhat_ptr + offs_c, (tl.sum(sum_dz_xmu, 0) * rstd).to(dtype), mask=mask_c)
    if residual_rstd_ptr is not None:
        sum_rhat = tl.sum(sum_dz_rmu, 0) * residual_rstd
        tl.store(residual_sum_dy_xhat_ptr + offs_c, sum_rhat.to(dtype), mask=mask_c)
        # sum_dy is stored a second time, because the gradient of each bias is a separate tensor.
        tl.store(residual_sum_dy_ptr + offs_c, sum_dy, mask=mask_c)


@triton.jit
def _dx_sub_tile(
    dx_ptr, dresidual_ptr, tensors, bits, norms, lines, param, row, col_block, shape,
    NEEDS_X: tl.constexpr, TWO_NORMS: tl.constexpr, ACT_GRAD: tl.constexpr, TILE: tl.constexpr,
    WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores dx and, if dresidual_ptr is not None, dresidual of a sub-tile."""
    load_at, at = tile_at(row, col_block, shape, TILE, 1, WHOLE)
    dz, x_centred, residual_centred = _load_sub_tile(
        tensors, load_at, bits, norms, param, NEEDS_X, TWO_NORMS, ACT_GRAD, TILE, ACC
    )
    norm, residual_norm, _ = norms
    line, residual_line = lines
    dx = dz * norm[2]
    if line is not None:
        dx += x_centred * line[1] + line[0]
    store_tile(dx_ptr, dx, at)
    if dresidual_ptr is not None:
        dresidual = dz
        if TWO_NORMS:
            dresidual = dz * residual_norm[2]
            if residual_line is not None:
                dresidual += residual_centred * residual_line[1] + residual_line[0]
        store_tile(dresidual_ptr, dresidual, at)


@triton.jit
def _bn_bwd_dx_kernel(
    dx_ptr, dresidual_ptr, dy_ptr, dy_skip_ptr, x_ptr, mask_ptr, residual_ptr,
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    residual_mean_ptr, residual_rstd_ptr, residual_weight_ptr, residual_bias_ptr,
    sum_dy_ptr, sum_dy_xhat_ptr, residual_sum_dy_xhat_ptr,
    count, C, L, rows_per_split, act_param: tl.float64, stats_count,
    ACT_GRAD: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Stores dx = (dz − (sum_dy + xhat·sum_dy_xhat)/stats_count)·(rstd·weight) and dresidual.

    This is dz·scale + ((x − mean)·slope + offset), where scale is rstd·weight, and `load_line`
    computes slope and offset. If sum_dy_ptr is None, dx is only dz·scale.

    If the residual has its own batch norm, dresidual is computed like dx, but from the residual.
    Otherwise dresidual is dz.
    """
    TWO_NORMS: tl.constexpr = residual_mean_ptr is not None
    NEEDS_X: tl.constexpr = sum_dy_ptr is not None or (
        ACT_GRAD is not identity_grad and mask_ptr is None
    )
    col_block, split = tl.program_id(0), tl.program_id(1)
    tensors, shape = (dy_ptr, dy_skip_ptr, x_ptr, mask_ptr, residual_ptr), (count, C, L)
    offs_c, mask_c = channel_ids(col_block, C, TILE)
    norms = load_norms(
        (mean_ptr, rstd_ptr, None, weight_ptr, bias_ptr),
        (residual_mean_ptr, residual_rstd_ptr, None, residual_weight_ptr, residual_bias_ptr),
        0.0, 0.0, offs_c, mask_c, TILE, ACC,
    )  # fmt: skip
    line: tl.constexpr = None
    residual_line: tl.constexpr = None
    if sum_dy_ptr is not None:
        line = load_line(
            sum_dy_ptr, sum_dy_xhat_ptr, norms[0], stats_count, offs_c, mask_c, TILE, ACC
        )
    if residual_sum_dy_xhat_ptr is not None:
        residual_line = load_line(
            sum_dy_ptr, residual_sum_dy_xhat_ptr, norms[1], stats_count, offs_c, mask_c, TILE, ACC
        )
    param = tl.full((), act_param, ACC)
    start, stop = split_rows(split, rows_per_split, count, TILE)
    whole = whole_rows(start, stop, count, TILE, UNROLL)
    for row in tl.range(start, whole, UNROLL * TILE.sub_rows, num_stages=STAGES):
        packed = load_mask(mask_ptr, row, stop, col_block, shape, TILE, UNROLL)
        for u in tl.static_range(UNROLL):
            _dx_sub_tile(
                dx_ptr, dresidual_ptr, tensors, (packed, u), norms, (line, residual_line), param,
                row + u * TILE.sub_rows, col_block, shape, NEEDS_X, TWO_NORMS, ACT_GRAD, TILE,
                True, ACC,
            )  # fmt: skip
    packed = load_mask(mask_ptr, whole, stop, col_block, shape, TILE, UNROLL)
    for row in tl.range(whole, stop, TILE.sub_rows, num_stages=1):
        _dx_sub_tile(
            dx_ptr, dresidual_ptr, tensors, (packed, (row - whole) // TILE.sub_rows), norms,
            (line, residual_line), param, row, col_block, shape, NEEDS_X, TWO_NORMS, ACT_GRAD, TILE,
            False, ACC,
        )  # fmt: skip


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
    """Returns the sums Σ dz and Σ dz·xhat of each channel, and dz.

    Here dz = (dy + dy_skip)·act'(z) and xhat = (x − mean)·rstd. act'(z) is the element's bit in
    ``mask``. If ``mask`` is None, z is recomputed from ``x`` and ``residual``. If ``residual_norm``
    is not None, the same two sums are also returned with xhat computed from ``residual``. Each sum
    is (C,), in fp64 if ``x`` is fp64, otherwise in fp32. ``dy``, ``dy_skip`` and ``residual`` have
    the memory format of ``x``. Without ``write_dz``, the returned dz is None.
    """
    planes = 2 if residual_norm is None else 3
    sums, dz = out or (
        Sums(*empty_channels(x, 2 if residual_norm is None else 4)),
        torch.empty_like(x) if write_dz else None,
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
    """Returns dx and dresidual, the gradients of ``x`` and ``residual``.

    Without ``write_dresidual``, dresidual is None. ``sums`` are the sums that `bn_backward_reduce`
    returns. ``count`` is the number of elements that each sum adds up. In evaluation ``sums`` is
    None, because the statistics are constants.
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
    )
    return dx, dresidual
