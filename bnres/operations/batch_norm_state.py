"""The tensors and options of one batch norm, which an operation spreads over its named tuples."""

from typing import Any, NamedTuple

from torch import Tensor


class BatchNormState(NamedTuple):
    """A batch norm's tensors and options, under the names of `batch_norm_act`'s arguments."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    momentum: float | Tensor = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None


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
    )


def split_momentum(momentum: float | Tensor) -> tuple[Tensor | None, float]:
    """A momentum as a device_momentum, which is a tensor or None, and a number."""
    return (momentum, 0.0) if isinstance(momentum, Tensor) else (None, float(momentum))
