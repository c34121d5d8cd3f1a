"""The statistics a batch norm normalises with, of the batch or running."""

import torch
from torch import Tensor

from bnres.kernels.dtypes import acc_type
from bnres.kernels.norm import RunningStatistics, Statistics


def channel_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    factor: Tensor | None,
    momentum: float,
    training: bool,
    eps: float,
    needs_grad: bool,
) -> Statistics | RunningStatistics:
    """Of the batch; in eval mode without gradients the running ones."""
    from bnres.kernels.bn_forward import bn_stats

    if training:
        return bn_stats(
            x, running_mean, running_var, momentum if factor is None else factor, eps,
            counter=counter,
        )  # fmt: skip
    assert running_mean is not None and running_var is not None
    if not needs_grad:
        return RunningStatistics(running_mean, running_var, eps)
    acc = acc_type(x)
    rstd = (1 / (running_var.double() + eps).sqrt()).to(acc)
    return Statistics(running_mean.to(acc, copy=True), rstd)


def note_updates(training: bool, *buffers: Tensor | None) -> None:
    """Tells autograd that running buffers changed, as an operator's mutates_args does."""
    for buffer in buffers if training else ():
        if buffer is not None:
            torch.autograd.graph.increment_version(buffer)
