"""The per-channel tensors of batch norms, as the launchers take and return them."""

from typing import Any, NamedTuple

from torch import Tensor


class Statistics(NamedTuple):
    """Of a batch: mean and 1/sqrt(biased variance + eps), each (C,)."""

    mean: Tensor
    rstd: Tensor


class RunningStatistics(NamedTuple):
    """What evaluation normalises with: mean and variance, each (C,), and eps."""

    mean: Tensor
    var: Tensor
    eps: float


class Norm(NamedTuple):
    """What one batch norm does to its channels; ``weight`` and ``bias`` are (C,) or None."""

    statistics: Statistics | RunningStatistics
    weight: Tensor | None = None
    bias: Tensor | None = None

    def pointers(self, prefix: str = "") -> dict[str, Any]:
        """The kernels' arguments that say this; those that it does not have are left out."""
        names = ("mean_ptr", "rstd_ptr")
        if isinstance(self.statistics, RunningStatistics):
            names = ("mean_ptr", "var_ptr", "eps")  # type: ignore[assignment]
        arguments = dict(zip(names, self.statistics, strict=True))
        arguments |= {"weight_ptr": self.weight, "bias_ptr": self.bias}
        return {prefix + name: value for name, value in arguments.items()}


class Sums(NamedTuple):
    """What backward sums of each channel, each (C,); the last where the residual has a norm."""

    dy: Tensor
    dy_xhat: Tensor
    residual_dy_xhat: Tensor | None = None
