"""Device functions that load what belongs to channels, and sum it over splits."""

import triton
import triton.language as tl


@triton.jit
def load_norm(
    mean_ptr, rstd_ptr, var_ptr, weight_ptr, eps, channel, mask, ACC: tl.constexpr
):  # fmt: skip
    """mean, rstd and rstd·weight of channels; rstd is stored, or made of a variance."""
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
    """bias + residual_bias of channels."""
    shift = tl.full(channel.shape, 0.0, ACC)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + channel, mask=mask, other=0).to(ACC)
    if residual_bias_ptr is not None:
        shift += tl.load(residual_bias_ptr + channel, mask=mask, other=0).to(ACC)
    return shift


@triton.jit
def load_mean_grads(
    sum_dy_ptr, sum_dy_xhat_ptr, rstd, count, channel, mask, ACC: tl.constexpr
):  # fmt: skip
    """sum_dy/count and sum_dy_xhat/count·rstd of channels."""
    inv_n = (1 / tl.cast(count, tl.float64)).to(ACC)
    mean_dy = tl.load(sum_dy_ptr + channel, mask=mask, other=0).to(ACC) * inv_n
    slope = tl.load(sum_dy_xhat_ptr + channel, mask=mask, other=0).to(ACC) * inv_n * rstd
    return mean_dy, slope


@triton.jit
def sum_splits(ptr, splits, offs_c, mask_c, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of partials (splits, C) in fp64, in a fixed order: (BLOCK_C,)."""
    total = tl.zeros((BLOCK_C,), tl.float64)
    for s in tl.range(0, splits, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        mask = (offs_s < splits)[:, None] & mask_c[None, :]
        part = tl.load(ptr + offs_s[:, None] * C + offs_c[None, :], mask=mask, other=0)
        total += tl.sum(part.to(tl.float64), 0)
    return total


@triton.jit
def scaled(x_centred, scale, residual_centred, residual_scale, shift):
    """x_centred·scale + residual_centred·residual_scale + shift, of what is not None."""
    z = x_centred * scale
    if residual_scale is not None:
        z += residual_centred * residual_scale
    if shift is not None:
        z += shift
    return z
