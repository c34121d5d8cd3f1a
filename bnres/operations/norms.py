"""A batch norm's tensors and options, and the statistics that it normalises with.

Those kept for backward are one tensor, with a row for the mean and one for rstd of each norm.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnres.kernels.dtypes import acc_type
from bnres.kernels.norm import RunningStatistics, Statistics
from bnres.operations.arguments import as_dtype_of


class BatchNormState(NamedTuple):
    """A batch norm's tensors and options, under the names of `batch_norm_act`'s arguments."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    momentum: float | Tensor = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None
    input_bias: Tensor | None = None


def state_of(inputs: Any, buffers: Any, spec: Any, prefix: str = "") -> BatchNormState:
    """One batch norm of an operation: the fields whose names begin with ``prefix``."""

    def field(group: Any, name: str) -> Any:
        return getattr(group, prefix + name)

    momentum = field(buffers, "device_momentum")
    return BatchNormState(
        field(buffers, "running_mean"),
        field(buffers, "running_var"),
        field(inputs, "weight"),
        field(inputs, "bias"),
        field(spec, "momentum") if momentum is None else momentum,
        field(spec, "eps"),
        field(buffers, "counter"),
        field(inputs, "input_bias"),
    )


def split_momentum(momentum: float | Tensor) -> tuple[Tensor | None, float]:
    """A momentum as a device_momentum, which is a tensor or None, and a number."""
    return (momentum, 0.0) if isinstance(momentum, Tensor) else (None, float(momentum))


# Rows start at a multiple of it, where kernels can load vectors.
ROW_BYTES = 128


def empty_statistics(x: Tensor, norms: int = 1) -> Tensor:
    """Rows for some norms of ``x``, (2·norms, C and padding), in fp32 (fp64 for fp64)."""
    acc = acc_type(x)
    step = ROW_BYTES // acc.itemsize
    return torch.empty((2 * norms, -(-x.shape[1] // step) * step), dtype=acc, device=x.device)


def rows_of(statistics: Tensor, x: Tensor) -> list[Statistics]:
    """The statistics of each norm, (C,)."""
    rows = statistics[:, : x.shape[1]].unbind()
    return [Statistics(*pair) for pair in zip(rows[::2], rows[1::2], strict=True)]


_BIASES_AND_MEANS = (
    ("input_bias", "running_mean"),
    ("residual_input_bias", "residual_running_mean"),
)


def without_input_bias(inputs: Any, buffers: Any, x: Tensor) -> Any:
    """The buffers for evaluation, with each input bias subtracted from its running mean."""
    for bias_name, mean_name in _BIASES_AND_MEANS:
        input_bias = getattr(inputs, bias_name, None)
        if input_bias is not None:
            mean = getattr(buffers, mean_name).to(acc_type(x)) - input_bias.detach()
            buffers = buffers._replace(**{mean_name: mean})
    return buffers


def copy_running(statistics: Tensor, x: Tensor, *norms: BatchNormState) -> Tensor:
    """Fills ``statistics`` from running ones, whose buffers may change before backward."""
    for (mean, rstd), norm in zip(rows_of(statistics, x), norms, strict=True):
        assert norm.running_mean is not None and norm.running_var is not None
        mean.copy_(norm.running_mean)
        rstd.copy_(1 / (norm.running_var.double() + norm.eps).sqrt())
    return statistics


def of_input_bias(statistics: Statistics, input_bias: Tensor | None) -> Statistics:
    """Statistics for evaluation; their mean is a differentiable function of ``input_bias``."""
    if input_bias is None:
        return statistics
    return statistics._replace(mean=statistics.mean - (input_bias - input_bias.detach()))


def input_bias_gradient(saved: Any, spec: Any, sum_dy: Any, prefix: str = "") -> Tensor:
    """weight·rstd·Σ dz; zeros in training, where the batch's mean cancels the bias."""
    input_bias, weight = (getattr(saved, prefix + name) for name in ("input_bias", "weight"))
    if spec.training:
        return torch.zeros_like(input_bias)
    gradient = sum_dy * rows_of(saved.statistics, saved.x)[-1 if prefix else 0].rstd
    return as_dtype_of(input_bias, gradient if weight is None else gradient * weight)


def launch_statistics(
    x: Tensor, norm: BatchNormState, training: bool, kept: Statistics | None
) -> Statistics | RunningStatistics:
    """What ``x`` is normalised with.

    In training these are the statistics of the batch, which are written to ``kept``, or to scratch
    memory if that is None. In evaluation ``kept`` already contains the running statistics, and
    the input bias has been subtracted from the running mean.
    """
    from bnres.kernels.bn_forward import bn_stats

    if training:
        return bn_stats(
            x, norm.running_mean, norm.running_var, norm.momentum, norm.eps,
            input_bias=norm.input_bias, counter=norm.num_batches_tracked, out=kept,
        )  # fmt: skip
    if kept is not None:
        return kept
    assert norm.running_mean is not None and norm.running_var is not None
    return RunningStatistics(norm.running_mean, norm.running_var, norm.eps)
