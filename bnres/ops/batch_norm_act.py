"""act(bn(x) + residual) and its gradients."""

import torch
from torch import Tensor

from bnres.kernels.dtypes import acc_type
from bnres.kernels.layout import channel_view, dense_like
from bnres.kernels.norm import Norm, Statistics
from bnres.ops.outputs import filled
from bnres.ops.statistics import channel_statistics


def forward_impl(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    factor: Tensor | None,
    momentum: float,
    training: bool,
    eps: float,
    act: str,
    act_param: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, rstd and the 1-bit mask; what no backward needs is empty."""
    from bnres.kernels.bn_forward import bn_apply

    statistics = channel_statistics(
        x, running_mean, running_var, counter, factor, momentum, training, eps, needs_grad
    )
    y, mask = bn_apply(
        x,
        Norm(statistics, weight, bias),
        residual,
        None,
        act,
        act_param,
        save_mask=saves_mask(residual is not None, act, needs_grad),
    )
    mean, rstd = statistics[:2] if needs_grad else (x.new_empty(0), x.new_empty(0))
    return y, mean, rstd, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def saves_mask(has_residual: bool, act: str, needs_grad: bool) -> bool:
    """Whether backward reads one bit an element in place of the residual."""
    return needs_grad and has_residual and act == "relu"


def reduces_first(training: bool, needs_dx: bool, needs_dz: bool, needs_sums: bool) -> bool:
    """Whether backward has a reduce pass; in eval mode dx and dz come without one."""
    return needs_sums or (training and needs_dx) or (needs_dz and not needs_dx)


def backward_impl(
    dy: Tensor,
    dy_skip: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    training: bool,
    act: str,
    act_param: float,
    needs_dx: bool,
    needs_dz: bool,
    needs_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dz, sum_dy and sum_dy_xhat; what is not needed is empty.

    dz, the gradient of the pre-activation, is the residual's gradient. Where it is written, the
    reduce pass writes it and the dx pass reads it in place of dy and dy_skip, the gradients of the
    two tensors that y was handed out as.
    """
    from bnres.kernels import bn_backward

    dy = dense_like(dy, x)
    dy_skip = None if dy_skip is None else dense_like(dy_skip, x)
    norm = Norm(Statistics(mean, rstd), weight, bias)
    dx, dz, sums = None, None, None
    reduces = reduces_first(training, needs_dx, needs_dz, needs_sums)
    if reduces:
        sums, dz = bn_backward.bn_backward_reduce(
            dy, x, norm, residual, None, mask, act, act_param, dy_skip=dy_skip, write_dz=needs_dz
        )
        if dz is not None:
            dy = dz
            dy_skip, residual, mask, act = None, None, None, "identity"
    if needs_dx:
        count = x.numel() // x.shape[1] if x.numel() else 1
        dx, written = bn_backward.bn_backward_dx(
            dy, x, norm, residual, None, mask, act, act_param, sums if training else None, count,
            dy_skip=dy_skip, write_dresidual=needs_dz and not reduces,
        )  # fmt: skip
        dz = dz if written is None else written
    return filled(x, dx, dz, *(sums[:2] if sums else (None, None)))


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The 1-bit mask of a dense ``x`` as booleans of its shape."""
    from bnres.kernels import bn_backward

    # A torch.func transform hands out wrapped tensors, and wraps new ones, which no kernel can
    # read. Of x the layout is enough; the mask has no derivative that unwrapping could lose.
    while torch._C._functorch.is_functorch_wrapped_tensor(mask):
        mask = torch._C._functorch.get_unwrapped(mask)
    with torch._C._DisableFuncTorch():
        ones = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).fill_(1)
        unit = torch.ones(x.shape[1], dtype=acc_type(x), device=x.device)
        # In eval mode, with unit statistics, dx is dy where the mask is set.
        passed, _ = bn_backward.bn_backward_dx(
            ones, ones, Norm(Statistics(unit, unit)), None, None, mask, "relu", 0.0, None, 1
        )
        return passed != 0


forward_op = torch.library.custom_op(
    "bnres::batch_norm_act_forward",
    forward_impl,
    mutates_args=("running_mean", "running_var", "counter"),
)
backward_op = torch.library.custom_op(
    "bnres::batch_norm_act_backward", backward_impl, mutates_args=()
)


@forward_op.register_fake
def _(
    x, weight, bias, residual, running_mean, running_var, counter, factor, momentum, training, eps,
    act, act_param, needs_grad,
):  # fmt: skip
    from bnres.kernels.outputs import mask_bytes

    stats = (x.shape[1], acc_type(x)) if needs_grad else (0, x.dtype)
    mask = 0
    if saves_mask(residual is not None, act, needs_grad) and x.numel():
        mask = mask_bytes(channel_view(x), x.element_size())
    return (
        torch.empty_like(x),
        x.new_empty(stats[0], dtype=stats[1]),
        x.new_empty(stats[0], dtype=stats[1]),
        x.new_empty(mask, dtype=torch.uint8),
    )


@backward_op.register_fake
def _(
    dy, dy_skip, x, weight, bias, residual, mean, rstd, mask, training, act, act_param, needs_dx,
    needs_dz, needs_sums,
):  # fmt: skip
    reduces = reduces_first(training, needs_dx, needs_dz, needs_sums)
    return (
        torch.empty_like(x) if needs_dx else x.new_empty(0),
        torch.empty_like(x) if needs_dz else x.new_empty(0),
        mean.new_empty(x.shape[1]) if reduces else x.new_empty(0),
        mean.new_empty(x.shape[1]) if reduces else x.new_empty(0),
    )
