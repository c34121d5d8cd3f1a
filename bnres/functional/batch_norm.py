"""Batch norm, alone and with a residual and an activation."""

from typing import Any

import torch
from torch import Tensor

from bnres.activations import resolve
from bnres.autograd.apply import apply
from bnres.autograd.batch_norm_act import BatchNormActFunction
from bnres.backend import uses_kernels
from bnres.functional.aten import batch_norm_act_aten
from bnres.functional.checks import check_input, check_norm, check_residual
from bnres.functional.prepare import (
    batch_counter,
    dense_pair,
    packed_buffers,
    packed_parameters,
    wants_grad,
)
from bnres.kernels.norm import Norm, Statistics
from bnres.recipes import has_recipe, leave_recipe, recording


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
    num_batches_tracked: Tensor | None = None,
    twice: bool = False,
) -> Any:
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
        num_batches_tracked: one integer or None; goes up by one in training.
        twice: hand the result out as two tensors that share their memory, one for each of two
            consumers: backward takes both gradients unsummed, and saves autograd's own addition.

    Returns:
        A tensor of the shape and memory format of ``input``, and of its dtype but for a
        residual of another; with ``twice`` two of them.

    Raises:
        ValueError: for one value per channel in training, a residual of another shape, an
            unknown activation or option.
        TypeError: for a dtype that is not supported.
        RuntimeError: for parameters or buffers of the wrong size, or on another device.

    Follows `torch.nn.functional.batch_norm` (Ioffe and Szegedy, arXiv 1502.03167).
    """
    name, param = resolve(act, act_kwargs)
    check_input(input, training)
    check_norm(input, running_mean, running_var, weight, bias, training)
    if residual is not None:
        check_residual(residual, input.shape, input.device)
    counter = batch_counter(num_batches_tracked, training, input)
    if not uses_kernels(input):
        y = batch_norm_act_aten(
            input, running_mean, running_var, weight, bias, residual, name, param, training,
            momentum, eps,
        )  # fmt: skip
        return (y, y) if twice else y
    records = recording() and not has_recipe(residual)
    input, residual = dense_pair(input, residual)
    needs_grad = wants_grad(input, weight, bias, residual)
    separate = twice and needs_grad and not torch.compiler.is_compiling()
    factor = momentum if isinstance(momentum, Tensor) else None
    weight, bias = packed_parameters(weight, bias)
    with packed_buffers(training, running_mean, running_var) as buffers:
        y, y_skip, mean, rstd, _ = apply(
            BatchNormActFunction, input, weight, bias, residual, *buffers, counter, factor,
            0.0 if factor is not None else momentum, training, eps, name, param, needs_grad,
            separate,
        )  # fmt: skip
    outputs = (y, y_skip) if separate else (y,)
    if records and needs_grad:

        def make(x: Tensor, mean: Tensor, rstd: Tensor, *others: Tensor | None) -> Tensor:
            from bnres.kernels.bn_forward import bn_apply

            weight, bias, residual = others
            norm = Norm(Statistics(mean, rstd), weight, bias)
            return bn_apply(x, norm, residual, None, name, param)[0]

        leave_recipe(make, (input, mean, rstd, weight, bias, residual), *outputs)
    return (outputs[0], outputs[-1]) if twice else y
