"""Device functions that load per-channel values and add up partial sums.

The elements of each channel are divided among programs. The part of one program is called a split.
Each split has a row of partial sums, with one sum for each channel.
"""

import triton
import triton.language as tl

from bnres.kernels.tiles import to_columns

# The kernels that combine partial sums (splits, C) process tiles of FINALIZE_SPLITS splits and
# FINALIZE_CHANNELS channels.
FINALIZE_SPLITS, FINALIZE_CHANNELS = tl.constexpr(256), tl.constexpr(8)


@triton.jit
def load_norm(
    mean_ptr, rstd_ptr, var_ptr, weight_ptr, eps, channel, mask, ACC: tl.constexpr
):  # fmt: skip
    """Returns mean, rstd = 1/sqrt(var + eps) and rstd·weight of each channel.

    If var_ptr is None, rstd is loaded.
    """
    mean = tl.load(mean_ptr + channel, mask=mask, other=0).to(ACC)
    if var_ptr is not None:
        var = tl.load(var_ptr + channel, mask=mask, other=1).to(ACC)
        rstd = tl.rsqrt(var + tl.full((), eps, ACC))
    else:
        rstd = tl.load(rstd_ptr + channel, mask=mask, other=1).to(ACC)
    scale = rstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, mask=mask, other=0).to(ACC)
    return mean, rstd, scale


@triton.jit
def load_biases(bias_ptr, residual_bias_ptr, channel, mask, ACC: tl.constexpr):
    """Returns bias + residual_bias of each channel. A bias whose pointer is None counts as 0."""
    shift = tl.full(channel.shape, 0.0, ACC)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + channel, mask=mask, other=0).to(ACC)
    if residual_bias_ptr is not None:
        shift += tl.load(residual_bias_ptr + channel, mask=mask, other=0).to(ACC)
    return shift


@triton.jit
def add_splits(ptr, splits, channel, mask, C, TRIPS: tl.constexpr):
    """Adds up partial sums (splits, C) in fp64 until FINALIZE_SPLITS rows remain.

    The result is (FINALIZE_SPLITS, FINALIZE_CHANNELS). The caller adds up its rows with `tl.sum`.
    TRIPS·FINALIZE_SPLITS must be at least ``splits``.
    """
    total = tl.zeros((FINALIZE_SPLITS, FINALIZE_CHANNELS), tl.float64)
    for trip in tl.static_range(TRIPS):
        split = trip * FINALIZE_SPLITS + tl.arange(0, FINALIZE_SPLITS)
        exists = (split < splits)[:, None] & mask[None, :]
        total += tl.load(ptr + split[:, None] * C + channel[None, :], mask=exists, other=0)
    return total


@triton.jit
def add_ranks(ptr, ranks, rank_stride, channel, mask, C, TRIPS: tl.constexpr):
    """Returns count, Σ(x − pivot) and Σ(x − pivot)² as partial sums over the ranks, and the pivot.

    A rank is a process. ptr points to count, mean and M2 = Σ(x − mean)² of each rank:
    (ranks, 3, C). The pivot is the first rank's mean. The partial sums have the form and dtype of
    those of `add_splits`.
    """
    pivot = tl.load(ptr + C + channel, mask=mask, other=0).to(tl.float64)
    count = tl.zeros((FINALIZE_SPLITS, FINALIZE_CHANNELS), tl.float64)
    sum_d, sum_d2 = count, count
    for trip in tl.static_range(TRIPS):
        rank = trip * FINALIZE_SPLITS + tl.arange(0, FINALIZE_SPLITS)
        exists = (rank < ranks)[:, None] & mask[None, :]
        at = ptr + rank[:, None] * tl.cast(rank_stride, tl.int64) + channel[None, :]
        n = tl.load(at, mask=exists, other=0).to(tl.float64)
        d = tl.load(at + C, mask=exists, other=0).to(tl.float64) - pivot[None, :]
        m2 = tl.load(at + 2 * C, mask=exists, other=0).to(tl.float64)
        count += n
        sum_d += n * d
        sum_d2 += m2 + n * d * d
    return count, sum_d, sum_d2, pivot


@triton.jit
def load_norms(
    norm_ptrs, residual_ptrs, eps, residual_eps, channel, mask, TILE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Returns mean, rstd and rstd·weight of each of two batch norms, and the sum of their biases.

    The first batch norm is that of x, and the second is that of the residual. If the residual has
    no batch norm, the second result must not be used. All results are broadcastable to a tile.
    """
    mean_ptr, rstd_ptr, var_ptr, weight_ptr, bias_ptr = norm_ptrs
    mean, rstd, scale = load_norm(mean_ptr, rstd_ptr, var_ptr, weight_ptr, eps, channel, mask, ACC)
    norm = to_columns(mean, TILE), to_columns(rstd, TILE), to_columns(scale, TILE)
    residual_norm = norm
    (
        residual_mean_ptr, residual_rstd_ptr, residual_var_ptr, residual_weight_ptr,
        residual_bias_ptr,
    ) = residual_ptrs  # fmt: skip
    if residual_mean_ptr is not None:
        mean, rstd, scale = load_norm(
            residual_mean_ptr, residual_rstd_ptr, residual_var_ptr, residual_weight_ptr,
            residual_eps, channel, mask, ACC,
        )  # fmt: skip
        residual_norm = to_columns(mean, TILE), to_columns(rstd, TILE), to_columns(scale, TILE)
    shift = load_biases(bias_ptr, residual_bias_ptr, channel, mask, ACC)
    return norm, residual_norm, to_columns(shift, TILE)


@triton.jit
def load_line(
    sum_dy_ptr, sum_dy_xhat_ptr, norm, count, channel, mask, TILE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Returns the offset and slope of the part of dx that depends on sum_dy and sum_dy_xhat.

    This part is offset + slope·(x − mean) = −scale·(sum_dy + xhat·sum_dy_xhat)/count, where
    xhat = (x − mean)·rstd and scale = rstd·weight.
    """
    _, rstd, scale = norm
    inv_n = (1 / tl.cast(count, tl.float64)).to(ACC)
    sum_dy = to_columns(tl.load(sum_dy_ptr + channel, mask=mask, other=0).to(ACC), TILE)
    sum_dy_xhat = to_columns(tl.load(sum_dy_xhat_ptr + channel, mask=mask, other=0).to(ACC), TILE)
    return -sum_dy * inv_n * scale, -sum_dy_xhat * inv_n * rstd * scale
