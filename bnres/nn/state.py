"""Reads the arguments that a batch norm module passes to a fused operation."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnres.operations.norms import BatchNormState
from bnres.operations.sync_batch_norm_act import group_named

Norm = nn.modules.batchnorm._BatchNorm


def next_state(bn: Norm) -> BatchNormState:
    """Returns the tensors and options of ``bn`` for its next call.

    In training they include ``num_batches_tracked``, which the call increments.
    """
    counts = bn.training and bn.track_running_stats
    momentum: float | Tensor = 0.0
    counter = _read(bn, bn._buffers, "num_batches_tracked") if counts else None
    if bn.momentum is not None:
        momentum = bn.momentum
    elif counter is not None:
        # With momentum=None the running statistics are averages over all batches, so batch n has
        # the weight 1/n.
        momentum = (counter + 1).to(torch.float64).reciprocal()
    tracked = not bn.training or bn.track_running_stats
    return BatchNormState(
        _read(bn, bn._buffers, "running_mean") if tracked else None,
        _read(bn, bn._buffers, "running_var") if tracked else None,
        _read(bn, bn._parameters, "weight"),
        _read(bn, bn._parameters, "bias"),
        momentum,
        bn.eps,
        counter,
    )


def _read(bn: Norm, registered: Any, name: str) -> Tensor | None:
    """Returns the parameter or buffer ``name`` of ``bn``.

    ``registered`` is the dict of parameters or buffers of ``bn``. A look-up in this dict takes a
    third of the time of getattr. Parametrised attributes are not in this dict.
    """
    return registered[name] if name in registered else getattr(bn, name)


def normalizes_by_batch(bn: Norm) -> bool:
    """Whether a call of ``bn`` normalises with the statistics of the batch."""
    return bn.training or (
        _read(bn, bn._buffers, "running_mean") is None
        and _read(bn, bn._buffers, "running_var") is None
    )


def group_of(bn: Norm) -> Any:
    """Returns the process group over which a call of ``bn`` synchronises its statistics, or None.

    A call synchronises under the same conditions as a call of `torch.nn.SyncBatchNorm`.
    """
    synchronises = getattr(type(bn), "synchronises", isinstance(bn, nn.SyncBatchNorm))
    if not (synchronises and bn.training and dist.is_available() and dist.is_initialized()):
        return None
    group = group_named(bn.process_group)
    return group if dist.get_world_size(group) > 1 else None
