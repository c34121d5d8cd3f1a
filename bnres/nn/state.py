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
    num_batches_tracked: Tensor | None


def next_state(bn: nn.modules.batchnorm._BatchNorm) -> NormState:
    """The state for a call of ``bn``, which counts the batch in training, as torch's does."""
    counter = bn.num_batches_tracked if bn.training and bn.track_running_stats else None
    if counter is not None and bn.momentum is None:
        counter.add_(1)  # the momentum is made of it
        counter = None
    tracked = not bn.training or bn.track_running_stats
    return NormState(
        bn.running_mean if tracked else None,
        bn.running_var if tracked else None,
        bn.weight,
        bn.bias,
        normalizes_by_batch(bn),
        next_momentum(bn),
        bn.eps,
        counter,
    )


def next_momentum(bn: nn.modules.batchnorm._BatchNorm) -> float | Tensor:
    """The weight of the batch that was counted last: 1/counter for the cumulative average."""
    if bn.momentum is not None:
        return bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        return bn.num_batches_tracked.to(torch.float64).reciprocal()
    return 0.0


def normalizes_by_batch(bn: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether a call of ``bn`` would use the statistics of its batch."""
    return bn.training or (bn.running_mean is None and bn.running_var is None)
