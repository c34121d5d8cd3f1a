"""Runs the fused operations for the audits, in evaluation, forward and backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnres import use_backend
from bnres.functional import BatchNormState, batch_norm_act, batch_norm_act_max_pool2d

OPERATIONS = (
    "bn",
    "bn_relu",
    "bn_add_relu",
    "bn_add_relu_fork",
    "bn_relu_pool",
    "bn_relu_pool_fork",
    "dual_bn_add_relu",
    "dual_bn_add_relu_fork",
)

Step = Callable[[], object]


def steps(operation: str, tensor: Callable[[], Tensor]) -> dict[str, Step]:
    """Returns functions that run an operation, by name.

    ``eval`` is a forward in evaluation, ``forward`` is a forward in training, and ``backward`` is
    only the backward.

    Args:
        operation: one of `OPERATIONS`.
        tensor: returns a new activation tensor.
    """
    x = tensor().requires_grad_()
    residual = tensor().requires_grad_() if "add" in operation else None
    channel = torch.rand(x.shape[1]) + 0.5
    states = [_state(channel) for _ in range(2)]
    inputs: list[Any] = [x, states[0].weight, states[0].bias]
    fork = operation.endswith("_fork")
    options: dict[str, Any] = {"act": None if operation == "bn" else "relu", "fork": fork}
    if "dual" in operation:
        options["residual_norm"] = states[1]
        inputs += states[1].weight, states[1].bias
    if residual is not None:
        options["residual"] = residual
        inputs.append(residual)

    def forward(training: bool) -> Any:
        with use_backend("triton"):
            if "pool" in operation:
                return batch_norm_act_max_pool2d(
                    x, kernel_size=3, stride=2, padding=1, training=training, fork=fork,
                    **states[0]._asdict(),
                )  # fmt: skip
            return batch_norm_act(x, training=training, **options, **states[0]._asdict())

    def evaluate() -> None:
        with torch.no_grad():
            forward(training=False)

    y = forward(training=True)
    outputs = y if isinstance(y, tuple) else (y,)
    dys = [torch.empty_like(t).copy_(t) for t in outputs]
    return {
        "eval": evaluate,
        "forward": lambda: forward(training=True),
        "backward": lambda: torch.autograd.grad(outputs, inputs, dys, retain_graph=True),
    }


def _state(channel: Tensor) -> BatchNormState:
    weight, bias = (channel.clone().requires_grad_() for _ in range(2))
    counter = torch.tensor(0)
    return BatchNormState(
        channel.clone(), channel.clone(), weight, bias, num_batches_tracked=counter
    )
