"""Batch norm, residual and activation by ATen's operations, for CPU tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.kernels.reference import ACTIVATION_FORMULAS
from bnres.operations.norms import BatchNormState


def batch_norm_act_aten(
    input: Tensor,
    norm: BatchNormState,
    training: bool,
    residual: Tensor | None = None,
    act: str = "identity",
    param: float = 0.0,
) -> Tensor:
    """`batch_norm_act`."""
    mean, var, weight, bias, momentum, eps, counter = norm
    if counter is not None:
        counter.add_(1)
    if isinstance(momentum, Tensor) and training:
        fresh = [None if b is None else torch.zeros_like(b) for b in (mean, var)]
        y = F.batch_norm(input, fresh[0], fresh[1], weight, bias, True, 1.0, eps)
        if input.numel():
            for buffer, stat in zip((mean, var), fresh, strict=True):
                if buffer is not None and stat is not None:
                    buffer.copy_((1 - momentum) * buffer + momentum * stat)
    else:
        number = 0.0 if isinstance(momentum, Tensor) else momentum
        y = F.batch_norm(input, mean, var, weight, bias, training, number, eps)
    # What batch norm has just made is nobody else's, so it can be written over.
    if residual is not None:
        in_place = not torch.is_grad_enabled() and residual.dtype == y.dtype
        y = y.add_(residual) if in_place else y + residual
    return y.relu_() if act == "relu" else ACTIVATION_FORMULAS[act](y, param)
