"""max_pool2d(act(bn(x))) and its gradients."""

import torch
from torch import Tensor

from bnres.kernels.dtypes import acc_type
from bnres.kernels.norm import Norm, Statistics
from bnres.kernels.window import Window
from bnres.ops.outputs import filled
from bnres.ops.statistics import channel_statistics


def forward_impl(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    factor: Tensor | None,
    momentum: float,
    training: bool,
    eps: float,
    act: str,
    act_param: float,
    window: list[int],
    ceil_mode: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y and, for backward, where the maxima lie, the x there, mean and rstd (else empty).

    ``window`` holds the fields of `bnres.kernels.window.Window`.
    """
    from bnres.kernels.bn_pool import bn_max_pool

    statistics = channel_statistics(
        x, running_mean, running_var, counter, factor, momentum, training, eps, needs_grad
    )
    y, index, x_max = bn_max_pool(
        x, Norm(statistics, weight, bias), act, act_param, Window(*window), ceil_mode,
        save=needs_grad,
    )  # fmt: skip
    if index is None or x_max is None:
        return y, *(x.new_empty(0) for _ in range(4))  # type: ignore[return-value]
    return y, index, x_max, *statistics[:2]


def backward_impl(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    x_max: Tensor,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    act: str,
    act_param: float,
    window: list[int],
    needs_dx: bool,
    needs_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, sum_dy and sum_dy_xhat; what is not needed is empty."""
    from bnres.kernels.bn_backward import bn_backward_reduce
    from bnres.kernels.bn_pool import bn_max_pool_backward_dx

    if dy.stride() != index.stride():
        dy = torch.empty_like(x_max).copy_(dy)
    norm = Norm(Statistics(mean, rstd), weight, bias)
    dx, sums = None, None
    if training or needs_sums:
        sums, _ = bn_backward_reduce(dy, x_max, norm, None, None, None, act, act_param)
    if needs_dx:
        count = x.numel() // x.shape[1] if x.numel() else 1
        dx = bn_max_pool_backward_dx(
            dy, index, x, norm, act, act_param, Window(*window), sums if training else None, count
        )
    return filled(x, dx, *(sums[:2] if sums else (None, None)))


forward_op = torch.library.custom_op(
    "bnres::batch_norm_act_max_pool_forward",
    forward_impl,
    mutates_args=("running_mean", "running_var", "counter"),
)
backward_op = torch.library.custom_op(
    "bnres::batch_norm_act_max_pool_backward", backward_impl, mutates_args=()
)


@forward_op.register_fake
def _(
    x, weight, bias, running_mean, running_var, counter, factor, momentum, training, eps, act,
    act_param, window, ceil_mode, needs_grad,
):  # fmt: skip
    window = Window(*window)
    shape = (*x.shape[:2], *window.output_size(*x.shape[2:], ceil_mode))
    memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last

    def pooled(dtype):
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)

    if not needs_grad:
        return pooled(x.dtype), *(x.new_empty(0) for _ in range(4))
    return (
        pooled(x.dtype),
        pooled(window.index_dtype),
        pooled(x.dtype),
        *(x.new_empty(x.shape[1], dtype=acc_type(x)) for _ in range(2)),
    )


@backward_op.register_fake
def _(
    dy, x, weight, bias, index, x_max, mean, rstd, training, act, act_param, window, needs_dx,
    needs_sums,
):  # fmt: skip
    reduces = training or needs_sums
    return (
        torch.empty_like(x) if needs_dx else x.new_empty(0),
        *(mean.new_empty(x.shape[1]) if reduces else x.new_empty(0) for _ in range(2)),
    )
