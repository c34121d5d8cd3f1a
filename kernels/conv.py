"""Convolution with batch norm, residual and activation in its epilogue, for inference."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnres.kernels.conv_config import ConvConfig, ConvShape, conv_config
from bnres.kernels.conv_tile import conv_tile
from bnres.kernels.device import ACTIVATIONS, round_to
from bnres.kernels.launch import launch, launch_scope
from bnres.kernels.norm import Norm
from bnres.kernels.pad import pad_channels


@triton.jit
def _conv_bn_act_kernel(
    y_ptr,
    x_ptr,
    filter_ptr,
    conv_bias_ptr,
    residual_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    M,
    H,
    W,
    C,
    OH,
    OW,
    K_OUT,
    act_param: tl.float64,
    eps: tl.float64,
    ACT: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SHAPE: tl.constexpr,
    ROW_CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNED_IN: tl.constexpr,
    ALIGNED_OUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """y = act((conv(x) + conv_bias − mean)·weight/sqrt(var + eps) + bias + residual): (M, K_OUT)."""
    acc, offs_m, offs_n = conv_tile(
        x_ptr, filter_ptr, M, H, W, C, OH, OW, K_OUT, SHAPE, ROW_CHANNELS, BLOCK_M, BLOCK_N, BLOCK_K,
        ALIGNED_IN, EVEN_K, PRECISION, INDEX,
    )  # fmt: skip
    mask_m, mask_n = offs_m < M, offs_n < K_OUT
    z = acc
    if HAS_CONV_BIAS:
        z += tl.load(conv_bias_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)[None, :]
    if HAS_NORM:
        mean = tl.load(mean_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)
        scale = tl.load(var_ptr + offs_n, mask=mask_n, other=1).to(tl.float32)
        scale = tl.rsqrt(scale + tl.full((), eps, tl.float32))
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)
        z = (z - mean[None, :]) * scale[None, :]
        if HAS_BIAS:
            z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)[None, :]
    stride_k = K_OUT
    if ALIGNED_OUT > 1:
        stride_k = (K_OUT // ALIGNED_OUT) * ALIGNED_OUT
    offsets = (offs_m * stride_k)[:, None] + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0).to(tl.float32)
    y = ACT(z, tl.full((), act_param, tl.float32))
    tl.store(y_ptr + offsets, round_to(y, y_ptr.dtype.element_ty), mask=mask)


def conv_bn_act(
    x: Tensor,
    filter: Tensor,
    conv_bias: Tensor | None,
    norm: Norm | None,
    eps: float,
    residual: Tensor | None,
    act: str,
    act_param: float,
    shape: ConvShape,
    *,
    config: ConvConfig | None = None,
) -> Tensor:
    """``act(bn(conv2d(x) + conv_bias) + residual)`` with running statistics: (N, K, OH, OW).

    ``x`` (N, C, H, W), ``filter`` (K, C, R, S) and ``residual`` are channels_last in memory, of one
    type of fp16, bf16 and fp32; sums are in fp32. The norm's rstd is a variance; None leaves the
    batch norm out.
    """
    y = empty_output(x, filter, shape)
    if y.numel() == 0:
        return y
    config, arguments = convolution(x, filter, y, shape, config)
    with launch_scope(x):
        launch(
            _conv_bn_act_kernel,
            config.grid(y.numel() // y.shape[1], y.shape[1]),
            y_ptr=y,
            conv_bias_ptr=conv_bias,
            residual_ptr=residual,
            mean_ptr=None if norm is None else norm.mean,
            var_ptr=None if norm is None else norm.rstd,
            weight_ptr=None if norm is None else norm.weight,
            bias_ptr=None if norm is None else norm.bias,
            act_param=act_param,
            eps=eps,
            ACT=ACTIVATIONS[act].forward,
            HAS_CONV_BIAS=conv_bias is not None,
            HAS_NORM=norm is not None,
            HAS_WEIGHT=norm is not None and norm.weight is not None,
            HAS_BIAS=norm is not None and norm.bias is not None,
            HAS_RESIDUAL=residual is not None,
            **arguments,
        )
    return y


def empty_output(x: Tensor, filter: Tensor, shape: ConvShape) -> Tensor:
    """What a convolution writes: (N, K, OH, OW), channels_last."""
    size = shape.output_size(x.shape[2], x.shape[3])
    return torch.empty(
        (x.shape[0], filter.shape[0], *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def convolution(
    x: Tensor, filter: Tensor, y: Tensor, shape: ConvShape, config: ConvConfig | None
) -> tuple[ConvConfig, dict[str, Any]]:
    """The configuration, and the arguments that every kernel with a `conv_tile` takes.

    Few channels are filled up with zeros, see `ConvShape.padded_channels`.
    """
    itemsize, out_channels = x.element_size(), y.shape[1]
    depth, by_rows = shape.depth(x.shape[1], itemsize), shape.by_rows(x.shape[1])
    channels = shape.padded_channels(x.shape[1], itemsize)
    x, filter = pad_channels(x, channels), pad_channels(filter, channels)
    rows = y.numel() // out_channels
    config = config or conv_config(rows, depth, out_channels, itemsize)
    vector = 16 // itemsize
    largest = max(x.numel(), y.numel(), filter.numel())
    return config, {
        "x_ptr": x,
        "filter_ptr": filter,
        "M": rows,
        "H": x.shape[2],
        "W": x.shape[3],
        "C": channels,
        "OH": y.shape[2],
        "OW": y.shape[3],
        "K_OUT": out_channels,
        "SHAPE": shape,
        "ROW_CHANNELS": channels if by_rows else 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "ALIGNED_IN": vector if channels % vector == 0 else 1,
        "ALIGNED_OUT": vector if out_channels % vector == 0 else 1,
        "EVEN_K": depth % config.block_k == 0,
        "PRECISION": precision(x),
        "INDEX": tl.int32 if largest < 2**31 - 2**20 else tl.int64,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def precision(x: Tensor) -> str:
    """tf32 where torch's own convolution may take it, else full fp32."""
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if allowed and x.dtype == torch.float32 else "ieee"
