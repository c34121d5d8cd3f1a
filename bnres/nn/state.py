"""What a batch norm module brings to a call."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class NormState(NamedTuple):
    """Buffers, parameters and options of one call of a batch norm."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float | Tensor
    eps: float


def next_state(bn: nn.modules.batchnorm._BatchNorm) -> NormState:
    """The state for a call of ``bn``, whose counter goes up in training as torch's does."""
    momentum: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = bn.num_batches_tracked.to(torch.float64).reciprocal()
    tracked = not bn.training or bn.track_running_stats
    return NormState(
        bn.running_mean if tracked else None,
        bn.running_var if tracked else None,
        bn.weight,
        bn.bias,
        bn.training or (bn.running_mean is None and bn.running_var is None),
        momentum,
        bn.eps,
    )


def normalizes_by_batch(bn: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether a call of ``bn`` would use the statistics of its batch."""
    return bn.training or (bn.running_mean is None and bn.running_var is None)
