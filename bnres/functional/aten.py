"""The same operations out of ATen's own, for CPU tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.kernels.reference import ACTIVATION_FORMULAS


def batch_norm_act_aten(
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
    """`batch_norm_act`."""
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
    # What batch norm has just made is nobody else's, so it can be written over.
    if residual is not None:
        in_place = not torch.is_grad_enabled() and residual.dtype == y.dtype
        y = y.add_(residual) if in_place else y + residual
    return y.relu_() if act == "relu" else ACTIVATION_FORMULAS[act](y, param)
