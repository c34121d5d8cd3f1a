"""Functional forms of the fused operations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.activations import resolve
from bnres.autograd import forward_function
from bnres.backend import uses_kernels
from bnres.kernels.dtypes import SUPPORTED_DTYPES
from bnres.kernels.layout import dense, dense_like
from bnres.kernels.reference import ACTIVATION_FORMULAS


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation with the signature of `torch.nn.functional.batch_norm`.

    See `batch_norm_act`, of which this is the case without residual and activation.
    """
    return batch_norm_act(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        act=None,
        training=training,
        momentum=momentum,
        eps=eps,
    )


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    act: str | type[torch.nn.Module] | None = "relu",
    act_kwargs: dict[str, Any] | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Fused ``act(batch_norm(input) + residual)``.

    Args:
        input: (N, C, *) of 2 to 5 dimensions, fp16, bf16, fp32 or fp64, contiguous or
            channels_last; other strides are copied into the nearer of the two.
        running_mean: (C,) of any floating dtype (on the ATen route, of one that ATen takes) or
            None; updated in place in training.
        running_var: (C,), as ``running_mean``; it takes the unbiased variance.
        weight: (C,) or None for 1.
        bias: (C,) or None for 0.
        residual: of the shape of ``input``, added before the activation; another dtype promotes
            the result as addition does.
        act: name or torch class of the activation, None for none.
        act_kwargs: options of the activation (``negative_slope``, ``approximate``).
        training: normalise with the statistics of the batch instead of the running ones.
        momentum: weight of the batch in the running statistics; a one-element tensor stays on
            its device.
        eps: added to the variance.

    Returns:
        A tensor of the shape and memory format of ``input``, and of its dtype but for a
        residual of another.

    Raises:
        ValueError: for one value per channel in training, a residual of another shape, an
            unknown activation or option.
        TypeError: for a dtype that is not supported.
        RuntimeError: for parameters or buffers of the wrong size, or on another device.

    Follows `torch.nn.functional.batch_norm` (Ioffe and Szegedy, arXiv 1502.03167).
    """
    name, param = resolve(act, act_kwargs)
    _check(input, running_mean, running_var, weight, bias, residual, training)
    if not uses_kernels(input):
        return _batch_norm_act_aten(
            input, running_mean, running_var, weight, bias, residual, name, param, training,
            momentum, eps,
        )  # fmt: skip
    if residual is not None and residual.dtype != input.dtype:
        # As bn(input) + residual would: autocast leaves such pairs behind.
        dtype = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(dtype), residual.to(dtype)
    input = dense(input)
    if residual is not None:
        residual = dense_like(residual, input)
        if residual is input:  # torch.compile takes no tensor twice
            residual = input.view_as(input)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, weight, bias, residual)
    )
    factor = momentum if isinstance(momentum, Tensor) else None
    weight, bias = (None if p is None else p.reshape(-1).contiguous() for p in (weight, bias))
    buffers = [running_mean, running_var]
    packed = [None if b is None else b.contiguous() for b in buffers]
    y = forward_function().apply(
        input, weight, bias, residual, *packed, factor,
        0.0 if factor is not None else momentum, training, eps, name, param, needs_grad,
    )[0]  # fmt: skip
    for buffer, copy in zip(buffers, packed, strict=True):
        if training and buffer is not None and copy is not None and copy is not buffer:
            buffer.copy_(copy)  # a strided buffer
    return y


def _check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
) -> None:
    if not 2 <= input.dim() <= 5:
        raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input)")
    if input.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"input must be fp16, bf16, fp32 or fp64, got {input.dtype}")
    channels = input.shape[1]
    if training:
        if input.numel() == channels and channels:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {input.size()}"
            )
    else:
        for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
            if buffer is None:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
    named = (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    )
    for name, tensor in named:
        if tensor is None:
            continue
        if tensor.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {tensor.numel()}")
        if tensor.device != input.device:
            raise RuntimeError(f"{name} is on {tensor.device}, but input is on {input.device}")
    if residual is not None:
        if residual.shape != input.shape:
            raise ValueError(
                f"residual must have the shape of input, {tuple(input.shape)}, "
                f"got {tuple(residual.shape)}"
            )
        if residual.device != input.device:
            raise RuntimeError(f"residual is on {residual.device}, but input is on {input.device}")


def _batch_norm_act_aten(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    param: float,
    training: bool,
    momentum: float | Tensor,
    eps: float,
) -> Tensor:
    """The same operation out of ATen's own, for CPU tensors."""
    if isinstance(momentum, Tensor) and training:
        fresh = [None if b is None else torch.zeros_like(b) for b in (running_mean, running_var)]
        y = F.batch_norm(input, fresh[0], fresh[1], weight, bias, True, 1.0, eps)
        if input.numel():
            for buffer, stat in zip((running_mean, running_var), fresh, strict=True):
                if buffer is not None and stat is not None:
                    buffer.copy_((1 - momentum) * buffer + momentum * stat)
    else:
        factor = 0.0 if isinstance(momentum, Tensor) else momentum
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    if residual is not None:
        y = y + residual
    return ACTIVATION_FORMULAS[act](y, param)
