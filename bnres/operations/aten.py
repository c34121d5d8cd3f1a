"""Computes batch norm, residual and activation with torch's own operations (ATen)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from bnres.kernels.reference import ACTIVATION_FORMULAS, bn_stats_ref
from bnres.kernels.torch_internals import in_transform
from bnres.operations.arguments import wants_grad
from bnres.operations.norms import BatchNormState


def batch_norm_act_aten(
    input: Tensor,
    norm: BatchNormState,
    training: bool,
    residual: Tensor | None = None,
    act: str = "identity",
    param: float = 0.0,
) -> Tensor:
    """Computes what `bnres.functional.batch_norm_act` computes, by torch's own operations."""
    mean, var, weight, bias, momentum, eps, counter, input_bias = norm
    if input_bias is not None:
        input = input + input_bias.to(input.dtype).view(-1, *[1] * (input.dim() - 2))
    if counter is not None:
        counter.add_(1)
    if isinstance(momentum, Tensor):
        if training:
            # The running statistics must be updated before the batch norm runs, because
            # torch.utils.checkpoint may stop its recomputation right after the batch norm and skip
            # a later update.
            if input.numel():
                bn_stats_ref(input.detach(), mean, var, momentum, eps)
            mean = var = None
        momentum = 0.0
    if not training and input.requires_grad and not wants_grad(mean, var, weight):
        y = _fixed(input, mean, var, weight, bias, eps)
    else:
        y = F.batch_norm(input, mean, var, weight, bias, training, momentum, eps)
    # Without gradients nothing else reads the batch norm's result y, so y + residual may overwrite
    # y. In torch.vmap the sum does not fit into y if only the residual is mapped over.
    if residual is not None:
        in_place = not (torch.is_grad_enabled() or is_compiling() or in_transform())
        in_place = in_place and residual.dtype == y.dtype
        y = y.add_(residual) if in_place else y + residual
    return y.relu_() if act == "relu" else ACTIVATION_FORMULAS[act](y, param)


def _fixed(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    """Returns the batch norm of ``x`` in evaluation, without saving ``x`` for backward.

    Only the gradients of the statistics and the weight depend on ``x``. The caller has checked that
    they are not needed.
    """
    acc = torch.promote_types(x.dtype, var.dtype)
    scale = (var.to(acc) + eps).rsqrt() if weight is None else weight * (var.to(acc) + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    sizes = (-1, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.view(sizes), x, scale.view(sizes)).to(x.dtype)
