"""A batch norm's tensors and options, and the statistics that it normalises with.

Those kept for backward are one tensor, with a row for the mean and one for rstd of each norm.
"""

from typing import Any, NamedTuple

from torch import Tensor

from bnres.kernels.dtypes import acc_type
from bnres.kernels.norm import RunningStatistics, Statistics
from bnres.operations.arguments import check_input, check_mapped, check_norm


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


def states_of(inputs: Any, buffers: Any, spec: Any) -> list[BatchNormState]:
    """The batch norm of x and, if it has one, that of the residual."""
    states = []
    options = ((spec.momentum, spec.eps), (spec.residual_momentum, spec.residual_eps))
    for i in range(1 + spec.has_residual_norm):
        weight, bias, input_bias = inputs[4 * i + 1 : 4 * i + 4]
        momentum, eps = options[i]
        mean, var, counter, device_momentum = buffers[4 * i : 4 * i + 4]
        if device_momentum is not None:
            momentum = device_momentum
        states.append(BatchNormState(mean, var, weight, bias, momentum, eps, counter, input_bias))
    return states


def check_batch_norm(x: Tensor, norm: BatchNormState, training: bool, name: str = "input") -> None:
    """Raises for an input that no batch norm takes, and for a state that does not fit it."""
    check_input(x, training, name)
    check_norm(norm, x.shape[1], x.device, training, "" if name == "input" else f"{name}_")
    if training:
        check_mapped(x, norm)


def split_momentum(momentum: float | Tensor) -> tuple[Tensor | None, float]:
    """A momentum as a device_momentum, which is a tensor or None, and a number."""
    return (momentum, 0.0) if isinstance(momentum, Tensor) else (None, float(momentum))


# Rows start at a multiple of it, where kernels can load vectors.
ROW_BYTES = 128


def empty_statistics(x: Tensor, spec: Any) -> Tensor:
    """Rows for the norms of a call, (2·norms, C and padding), in fp32 (fp64 for fp64)."""
    acc, rows = acc_type(x), 4 if spec.has_residual_norm else 2
    step = ROW_BYTES // acc.itemsize
    # Sizes that are not in a tuple are read faster.
    return x.new_empty(rows, -(-x.shape[1] // step) * step, dtype=acc)


def rows_of(statistics: Tensor, x: Tensor) -> list[Statistics]:
    """The statistics of each norm, (C,)."""
    rows = statistics[:, : x.shape[1]].unbind()
    return [Statistics(*pair) for pair in zip(rows[::2], rows[1::2], strict=True)]


def prepare_evaluation(inputs: Any, buffers: Any, spec: Any, statistics: Tensor | None) -> Any:
    """The buffers for evaluation: with the running means of inputs to which no bias is added.

    ``statistics``, if given, are filled from them, as the buffers may change before backward.
    """
    x = inputs.x
    if inputs.input_bias is not None:
        mean = buffers.running_mean.to(acc_type(x)) - inputs.input_bias.detach()
        buffers = buffers._replace(running_mean=mean)
    if inputs.residual_input_bias is not None:
        mean = buffers.residual_running_mean.to(acc_type(x)) - inputs.residual_input_bias.detach()
        buffers = buffers._replace(residual_running_mean=mean)
    if statistics is not None:
        states: Any = states_of(inputs, buffers, spec)
        for (mean, rstd), norm in zip(rows_of(statistics, x), states, strict=True):
            mean.copy_(norm.running_mean)
            rstd.copy_(1 / (norm.running_var.double() + norm.eps).sqrt())
    return buffers


def of_input_bias(statistics: Statistics, input_bias: Tensor | None) -> Statistics:
    """Statistics for evaluation; their mean is a differentiable function of ``input_bias``."""
    if input_bias is None:
        return statistics
    return statistics._replace(mean=statistics.mean - (input_bias - input_bias.detach()))


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
