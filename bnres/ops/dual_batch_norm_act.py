"""act(bn_a(x_a) + bn_b(x_b)) and its gradients."""

import torch
from torch import Tensor

from bnres.kernels.dtypes import acc_type
from bnres.kernels.layout import dense_like
from bnres.kernels.norm import Norm, Statistics
from bnres.ops.outputs import filled
from bnres.ops.statistics import channel_statistics


def forward_impl(
    x_a: Tensor,
    weight_a: Tensor | None,
    bias_a: Tensor | None,
    x_b: Tensor,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    running_mean_a: Tensor | None,
    running_var_a: Tensor | None,
    counter_a: Tensor | None,
    factor_a: Tensor | None,
    running_mean_b: Tensor | None,
    running_var_b: Tensor | None,
    counter_b: Tensor | None,
    factor_b: Tensor | None,
    momentum_a: float,
    momentum_b: float,
    eps_a: float,
    eps_b: float,
    training: bool,
    act: str,
    act_param: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y and, for backward, mean and rstd of both inputs (else empty)."""
    from bnres.kernels.bn_forward import bn_apply

    statistics_a = channel_statistics(
        x_a,
        running_mean_a,
        running_var_a,
        counter_a,
        factor_a,
        momentum_a,
        training,
        eps_a,
        needs_grad,
    )
    statistics_b = channel_statistics(
        x_b,
        running_mean_b,
        running_var_b,
        counter_b,
        factor_b,
        momentum_b,
        training,
        eps_b,
        needs_grad,
    )
    norm_a, norm_b = Norm(statistics_a, weight_a, bias_a), Norm(statistics_b, weight_b, bias_b)
    y, _ = bn_apply(x_a, norm_a, x_b, norm_b, act, act_param)
    if not needs_grad:
        return y, *(x_a.new_empty(0) for _ in range(4))  # type: ignore[return-value]
    return y, *statistics_a[:2], *statistics_b[:2]


def backward_impl(
    dy: Tensor,
    dy_skip: Tensor | None,
    x_a: Tensor,
    weight_a: Tensor | None,
    bias_a: Tensor | None,
    x_b: Tensor,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    mean_a: Tensor,
    rstd_a: Tensor,
    mean_b: Tensor,
    rstd_b: Tensor,
    training: bool,
    act: str,
    act_param: float,
    needs_dx: bool,
    needs_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx_a, dx_b, sum_dy, sum_dy_xhat_a and sum_dy_xhat_b; what is not needed is empty."""
    from bnres.kernels import bn_backward

    dy = dense_like(dy, x_a)
    dy_skip = None if dy_skip is None else dense_like(dy_skip, x_a)
    norm_a = Norm(Statistics(mean_a, rstd_a), weight_a, bias_a)
    norm_b = Norm(Statistics(mean_b, rstd_b), weight_b, bias_b)
    dx_a, dx_b, sums = None, None, None
    if training or needs_sums:
        sums, _ = bn_backward.bn_backward_reduce(
            dy, x_a, norm_a, x_b, norm_b, None, act, act_param, dy_skip=dy_skip
        )
    if needs_dx:
        count = x_a.numel() // x_a.shape[1] if x_a.numel() else 1
        dx_a, dx_b = bn_backward.bn_backward_dx(
            dy, x_a, norm_a, x_b, norm_b, None, act, act_param, sums if training else None, count,
            dy_skip=dy_skip, write_dresidual=True,
        )  # fmt: skip
    return filled(x_a, dx_a, dx_b, *(sums or (None,) * 3))


forward_op = torch.library.custom_op(
    "bnres::dual_batch_norm_act_forward",
    forward_impl,
    mutates_args=(
        "running_mean_a",
        "running_var_a",
        "counter_a",
        "running_mean_b",
        "running_var_b",
        "counter_b",
    ),
)
backward_op = torch.library.custom_op(
    "bnres::dual_batch_norm_act_backward", backward_impl, mutates_args=()
)


@forward_op.register_fake
def _(x_a, *arguments):
    needs_grad = arguments[-1]
    channels = x_a.shape[1] if needs_grad else 0
    dtype = acc_type(x_a) if needs_grad else x_a.dtype
    return torch.empty_like(x_a), *(x_a.new_empty(channels, dtype=dtype) for _ in range(4))


@backward_op.register_fake
def _(dy, dy_skip, x_a, weight_a, bias_a, x_b, *arguments):
    training, (needs_dx, needs_sums) = arguments[6], arguments[-2:]
    reduces = training or needs_sums
    return (
        torch.empty_like(x_a) if needs_dx else x_a.new_empty(0),
        torch.empty_like(x_b) if needs_dx else x_a.new_empty(0),
        *(
            x_a.new_empty(x_a.shape[1], dtype=acc_type(x_a)) if reduces else x_a.new_empty(0)
            for _ in range(3)
        ),
    )
