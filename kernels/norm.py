"""Named tuples of per-channel tensors: arguments and results of functions that launch kernels."""

from typing import Any, NamedTuple

from torch import Tensor


class Statistics(NamedTuple):
    """The statistics of a batch: mean and 1/sqrt(biased variance + eps), each (C,)."""

    mean: Tensor
    rstd: Tensor


class RunningStatistics(NamedTuple):
    """The statistics for evaluation: running mean (C,), running variance (C,) and eps."""

    mean: Tensor
    var: Tensor
    eps: float


class Norm(NamedTuple):
    """Statistics and parameters of one batch norm.

    ``weight`` and ``bias`` are (C,). A weight of None means 1, and a bias of None means 0.
    """

    statistics: Statistics | RunningStatistics
    weight: Tensor | None = None
    bias: Tensor | None = None

    def pointers(self, prefix: str = "") -> dict[str, Any]:
        """Returns the kernels' arguments for this norm. Their names begin with ``prefix``."""
        names = ("mean_ptr", "rstd_ptr")
        if isinstance(self.statistics, RunningStatistics):
            names = ("mean_ptr", "var_ptr", "eps")  # type: ignore[assignment]
        arguments = dict(zip(names, self.statistics, strict=True))
        arguments |= {"weight_ptr": self.weight, "bias_ptr": self.bias}
        return {prefix + name: value for name, value in arguments.items()}


def pointers(norm: Norm, residual_norm: Norm | None) -> dict[str, Any]:
    """Returns the kernels' arguments for a norm, and for the residual's norm if there is one."""
    other = {} if residual_norm is None else residual_norm.pointers("residual_")
    return norm.pointers() | other


class Sums(NamedTuple):
    """The sums over each channel that backward needs: Σ dz and Σ dz·xhat, each (C,).

    Here dz is the gradient of the activation's input, and xhat = (x − mean)·rstd. If the residual
    has its own batch norm, ``residual_dy`` and ``residual_dy_xhat`` are the same sums, but with
    xhat computed from the residual. Otherwise they are None.
    """

    dy: Tensor
    dy_xhat: Tensor
    residual_dy: Tensor | None = None
    residual_dy_xhat: Tensor | None = None
