"""Handles the tensors, options and statistics of an operation's batch norms.

In this file a norm is one batch norm. An operation has a norm of x, and may also have a norm of the
residual. The statistics for backward are stored in one tensor, in which each norm has a row for the
mean and a row for rstd = 1/sqrt(var + eps).
"""

from typing import Any, NamedTuple

from torch import Tensor

from bnres.kernels.dtypes import acc_type
from bnres.kernels.norm import RunningStatistics, Statistics
from bnres.operations.arguments import check_input, check_mapped, check_norm


class BatchNormState(NamedTuple):
    """A batch norm's tensors and options. `bnres.functional.batch_norm_act` explains the fields."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    momentum: float | Tensor = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None
    input_bias: Tensor | None = None


def states_of(inputs: Any, buffers: Any, spec: Any) -> list[BatchNormState]:
    """Returns the state of x's norm, then the state of the residual's norm if there is one."""
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
    """Raises an error unless ``x`` is a valid input of a batch norm and ``norm`` fits ``x``."""
    check_input(x, training, name)
    check_norm(norm, x.shape[1], x.device, training, "" if name == "input" else f"{name}_")
    if training:
        check_mapped(x, norm)


def split_momentum(momentum: float | Tensor) -> tuple[Tensor | None, float]:
    """Returns (momentum, 0.0) if the momentum is a tensor, otherwise (None, momentum)."""
    return (momentum, 0.0) if isinstance(momentum, Tensor) else (None, float(momentum))


# The alignment of each row of the statistics, so that kernels can use vector loads.
ROW_BYTES = 128


def empty_statistics(x: Tensor, spec: Any) -> Tensor:
    """Returns uninitialised statistics, two rows for each norm, in fp64 if x is fp64, else in fp32.

    A row has C elements, padded to a multiple of ``ROW_BYTES``.
    """
    acc, rows = acc_type(x), 4 if spec.has_residual_norm else 2
    step = ROW_BYTES // acc.itemsize
    # torch parses separate sizes faster than a tuple.
    return x.new_empty(rows, -(-x.shape[1] // step) * step, dtype=acc)


def rows_of(statistics: Tensor, x: Tensor) -> list[Statistics]:
    """Returns the mean (C,) and the rstd (C,) of each norm as views of ``statistics``."""
    rows = statistics[:, : x.shape[1]].unbind()
    return [Statistics(*pair) for pair in zip(rows[::2], rows[1::2], strict=True)]


def prepare_evaluation(inputs: Any, buffers: Any, spec: Any, statistics: Tensor | None) -> Any:
    """Returns the buffers for evaluation, with each input bias subtracted from its running mean.

    The kernels then need not add the input bias to x. If ``statistics`` is given, each norm's mean
    and rstd are stored there, because the buffers may change before backward.
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
    """Returns ``statistics`` with a mean that is differentiable with respect to ``input_bias``.

    `prepare_evaluation` has subtracted a detached ``input_bias`` from the mean. The mean keeps its
    value here.
    """
    if input_bias is None:
        return statistics
    return statistics._replace(mean=statistics.mean - (input_bias - input_bias.detach()))


def launch_statistics(
    x: Tensor, norm: BatchNormState, training: bool, kept: Statistics | None
) -> Statistics | RunningStatistics:
    """Returns the statistics with which ``x`` is normalised.

    - In training, a kernel computes the statistics of the batch and updates the buffers of
      ``norm``. It writes the statistics to ``kept``, or to scratch memory if ``kept`` is None.
    - In evaluation, the result is ``kept``, which `prepare_evaluation` has filled. If ``kept`` is
      None, the result is the running statistics of ``norm``.
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
