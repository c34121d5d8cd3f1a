"""Convolution fused with batch norm, residual and activation, for inference.

The kernel computes the convolution of channels_last tensors as a matrix product. Each row of the
product is an output position, and each column is an output channel. Batch norm, residual and
activation are applied to the product before it is stored.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.channels import load_norm
from bnres.kernels.conv_config import ConvConfig, ConvShape, conv_config
from bnres.kernels.device import ACTIVATIONS, round_to
from bnres.kernels.launch import PLANS, Plan, launch
from bnres.kernels.norm import Norm, RunningStatistics
from bnres.kernels.outputs import empty_convolved


@triton.jit
def _conv_bn_act_kernel(
    y_ptr, x_ptr, filter_ptr, conv_bias_ptr, residual_ptr,
    mean_ptr, var_ptr, weight_ptr, bias_ptr,
    M, H, W, C, OH, OW, K_OUT, act_param: tl.float64, eps: tl.float64,
    ACT: tl.constexpr, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, ALIGNED_IN: tl.constexpr, ALIGNED_OUT: tl.constexpr,
    EVEN_K: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Stores y = act((conv(x) + conv_bias − mean)·weight/sqrt(var + eps) + bias + residual).

    y is (M, K_OUT), with M output positions and K_OUT output channels.
    """
    blocks_n = tl.cdiv(K_OUT, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    stride_c = (C // ALIGNED_IN) * ALIGNED_IN
    offs_m = tl.cast(pid_m, INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.cast(pid_n, INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < K_OUT
    n = offs_m // (OH * OW)
    rest = offs_m - n * (OH * OW)
    oh = rest // OW
    h0 = oh * SHAPE.stride_h - SHAPE.padding_h
    w0 = (rest - oh * OW) * SHAPE.stride_w - SHAPE.padding_w
    x_rows = ((n * H + h0) * W + w0) * stride_c
    filter_rows = offs_n * (stride_c * SHAPE.taps)
    blocks_k = tl.cdiv(stride_c, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, SHAPE.taps * blocks_k):
        tap = step // blocks_k
        k = (step - tap * blocks_k) * BLOCK_K
        r = tap // SHAPE.kernel_w
        s = tap - r * SHAPE.kernel_w
        h = h0 + r * SHAPE.dilation_h
        w = w0 + s * SHAPE.dilation_w
        mask_x = (mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        shift = (r * SHAPE.dilation_h * W + s * SHAPE.dilation_w) * stride_c
        mask_filter = mask_n[None, :]
        if not EVEN_K:
            mask_x = mask_x & (k + offs_k < stride_c)[None, :]
            mask_filter = mask_filter & (k + offs_k < stride_c)[:, None]
        x = tl.load(x_ptr + ((x_rows + shift + k)[:, None] + offs_k[None, :]), mask=mask_x, other=0)
        filter = tl.load(
            filter_ptr + ((filter_rows + (tap * stride_c + k))[None, :] + offs_k[:, None]),
            mask=mask_filter,
            other=0,
        )
        acc = tl.dot(x, filter, acc)
    z = acc
    if conv_bias_ptr is not None:
        z += tl.load(conv_bias_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)[None, :]
    mean, _, scale = load_norm(mean_ptr, None, var_ptr, weight_ptr, eps, offs_n, mask_n, tl.float32)
    z = (z - mean[None, :]) * scale[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)[None, :]
    stride_k = (K_OUT // ALIGNED_OUT) * ALIGNED_OUT
    offsets = (offs_m * stride_k)[:, None] + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0).to(tl.float32)
    y = ACT(z, tl.full((), act_param, tl.float32))
    tl.store(y_ptr + offsets, round_to(y, y_ptr.dtype.element_ty), mask=mask)


def conv_bn_act(
    x: Tensor,
    filter: Tensor,
    conv_bias: Tensor | None,
    norm: Norm,
    residual: Tensor | None,
    act: str,
    act_param: float,
    shape: ConvShape,
    *,
    config: ConvConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns y = act(norm(conv2d(x) + conv_bias) + residual): (N, K, OH, OW), channels_last.

    The statistics of ``norm`` are `RunningStatistics`. ``x`` (N, C, H, W), ``filter`` (K, C, R, S)
    and ``residual`` are channels_last and have the same dtype, which is fp16, bf16 or fp32. fp32
    operands are rounded to TF32, and sums are in fp32. If ``config`` is None, `conv_config` chooses
    the configuration.

    Raises:
        TypeError: if the statistics of ``norm`` are not `RunningStatistics`.
    """
    if not isinstance(norm.statistics, RunningStatistics):
        raise TypeError(f"norm must have RunningStatistics, got {type(norm.statistics).__name__}")
    out_channels = filter.shape[0]
    y = empty_convolved(x, out_channels, shape) if out is None else out
    if y.numel() == 0:
        return y
    launch(
        _conv_bn_act_kernel,
        _plan(x.shape, out_channels, x.element_size(), shape, config),
        y_ptr=y,
        x_ptr=x,
        filter_ptr=filter,
        conv_bias_ptr=conv_bias,
        residual_ptr=residual,
        **norm.pointers(),
        act_param=act_param,
        ACT=ACTIVATIONS[act].forward,
    )
    return y


@lru_cache(PLANS)
def _plan(
    size: torch.Size, out_channels: int, itemsize: int, shape: ConvShape, config: ConvConfig | None
) -> Plan:
    n, channels, height, width = size
    out_height, out_width = shape.output_size(height, width)
    rows = n * out_height * out_width
    config = config or conv_config(rows, channels, out_channels, itemsize)
    vector = 16 // itemsize
    largest = max(
        n * channels * height * width, rows * out_channels, out_channels * channels * shape.taps
    )
    arguments = {
        "M": rows,
        "H": height,
        "W": width,
        "C": channels,
        "OH": out_height,
        "OW": out_width,
        "K_OUT": out_channels,
        "SHAPE": shape,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "ALIGNED_IN": vector if channels % vector == 0 else 1,
        "ALIGNED_OUT": vector if out_channels % vector == 0 else 1,
        "EVEN_K": channels % config.block_k == 0,
        "INDEX": tl.int32 if largest < 2**31 - 2**20 else tl.int64,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    programs = -(-rows // config.block_m) * -(-out_channels // config.block_n)
    return Plan((programs,), arguments)
