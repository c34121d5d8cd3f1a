"""The fused operations as the audits run them: evaluation, forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from bnres.kernels.window import Window
from bnres.ops import batch_norm_act, batch_norm_act_max_pool, dual_batch_norm_act

OPERATIONS = (
    "bn",
    "bn_relu",
    "bn_add_relu",
    "bn_add_relu_twice",
    "bn_relu_pool",
    "dual_bn_add_relu",
)
STEM_WINDOW = Window(3, 3, 2, 2, 1, 1, 1, 1).as_list()

Step = Callable[[], object]


def steps(operation: str, tensor: Callable[[], Tensor]) -> dict[str, Step]:
    """``eval``, ``forward`` (training) and ``backward`` of an operation.

    Backward takes what a training forward kept, which is run here once.

    Args:
        operation: one of `OPERATIONS`.
        tensor: makes an activation tensor.
    """
    if operation == "dual_bn_add_relu":
        return _dual(tensor)
    if operation == "bn_relu_pool":
        return _pool(tensor)
    return _single(operation, tensor)


def _channel(x: Tensor) -> Tensor:
    return torch.rand(x.shape[1]) + 0.5


def _single(operation: str, tensor: Callable[[], Tensor]) -> dict[str, Step]:
    x, dy = tensor(), tensor()
    channel = _channel(x)
    has_residual, act = "add" in operation, "identity" if operation == "bn" else "relu"
    residual = tensor() if has_residual else None
    dy_skip = tensor() if operation.endswith("twice") else None
    counter = torch.tensor(0)

    def forward(training: bool) -> tuple[Tensor, ...]:
        return batch_norm_act.forward_impl(
            x, channel, channel, residual, channel.clone(), channel.clone(), counter, None, 0.1,
            training, 1e-5, act, 0.0, training,
        )  # fmt: skip

    _, mean, rstd, mask = forward(training=True)
    return {
        "eval": lambda: forward(training=False),
        "forward": lambda: forward(training=True),
        "backward": lambda: batch_norm_act.backward_impl(
            dy, dy_skip, x, channel, channel, None, mean, rstd, mask if has_residual else None,
            True, act, 0.0, True, has_residual, True,
        ),
    }  # fmt: skip


def _dual(tensor: Callable[[], Tensor]) -> dict[str, Step]:
    x_a, x_b, dy = tensor(), tensor(), tensor()
    channel = _channel(x_a)

    def forward(training: bool) -> tuple[Tensor, ...]:
        a, b, c, d = (channel.clone() for _ in range(4))
        return dual_batch_norm_act.forward_impl(
            x_a, channel, channel, x_b, channel, channel, a, b, torch.tensor(0), None, c, d,
            torch.tensor(0), None, 0.1, 0.1, 1e-5, 1e-5, training, "relu", 0.0, training,
        )  # fmt: skip

    _, mean_a, rstd_a, mean_b, rstd_b = forward(training=True)
    return {
        "eval": lambda: forward(training=False),
        "forward": lambda: forward(training=True),
        "backward": lambda: dual_batch_norm_act.backward_impl(
            dy, None, x_a, channel, channel, x_b, channel, channel, mean_a, rstd_a, mean_b, rstd_b, True, "relu", 0.0,
            True, True,
        ),
    }  # fmt: skip


def _pool(tensor: Callable[[], Tensor]) -> dict[str, Step]:
    x = tensor()
    channel = _channel(x)

    def forward(training: bool) -> tuple[Tensor, ...]:
        return batch_norm_act_max_pool.forward_impl(
            x, channel, channel, channel.clone(), channel.clone(), torch.tensor(0), None, 0.1, training, 1e-5,
            "relu", 0.0, STEM_WINDOW, False, training,
        )  # fmt: skip

    y, index, x_max, mean, rstd = forward(training=True)
    dy = torch.empty_like(x_max).copy_(y)
    return {
        "eval": lambda: forward(training=False),
        "forward": lambda: forward(training=True),
        "backward": lambda: batch_norm_act_max_pool.backward_impl(
            dy, x, channel, channel, index, x_max, mean, rstd, True, "relu", 0.0, STEM_WINDOW,
            True, True,
        ),
    }  # fmt: skip
