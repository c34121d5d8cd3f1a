"""The launchers' signatures in plain, differentiable torch, written from the formulas.

Tests hold the kernels against them; the double backward and forward-mode derivatives differentiate
them. The one difference in form: where a kernel keeps one bit an element, ``mask`` is a tensor of
booleans here.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.kernels.dtypes import acc_type

# An activation of the pre-activation z; the second argument is leaky_relu's slope.
ACTIVATION_FORMULAS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda z, param: z,
    "relu": lambda z, param: F.relu(z),
    "relu6": lambda z, param: F.relu6(z),
    "leaky_relu": lambda z, param: F.leaky_relu(z, param),
    "hardswish": lambda z, param: F.hardswish(z),
    "sigmoid": lambda z, param: z.sigmoid(),
    "silu": lambda z, param: F.silu(z),
    "gelu": lambda z, param: F.gelu(z),
    "gelu_tanh": lambda z, param: F.gelu(z, approximate="tanh"),
}


def reduced_dims(x: Tensor) -> list[int]:
    """Every dimension but the channels'."""
    return [0, *range(2, x.dim())]


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """``v`` (C,) in the type of the statistics, broadcastable to ``x`` (N, C, *)."""
    return v.to(acc_type(x)).view(1, -1, *[1] * (x.dim() - 2))


def bn_stats_ref(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """mean = E[x], rstd = 1/sqrt(E[(x − mean)²] + eps); running buffers with the unbiased variance."""
    dims, count = reduced_dims(x), x[:, 0].numel()
    wide = x.to(acc_type(x))
    mean = wide.mean(dims)
    var = (wide - per_channel(mean, x)).square().mean(dims)
    for buffer, stat in ((running_mean, mean), (running_var, var * count / max(count - 1, 1))):
        if buffer is not None:
            buffer.copy_((1 - momentum) * buffer + momentum * stat.detach())
    return mean, 1 / (var + eps).sqrt()


def _pre_activation(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """z = (x − mean)·rstd·weight + bias + residual."""
    z = (x.to(acc_type(x)) - per_channel(mean, x)) * per_channel(rstd, x)
    if weight is not None:
        z = z * per_channel(weight, x)
    if bias is not None:
        z = z + per_channel(bias, x)
    return z if residual is None else z + residual


def bn_apply_ref(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    act_param: float,
    *,
    save_mask: bool = False,
    eps: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = act(z), and the mask of ``not z <= 0``; with ``eps``, ``rstd`` is a variance."""
    if eps is not None:
        rstd = 1 / (rstd.to(acc_type(x)) + eps).sqrt()
    z = _pre_activation(x, mean, rstd, weight, bias, residual)
    y = ACTIVATION_FORMULAS[act](z, act_param).to(x.dtype)
    return y, ~(z <= 0) if save_mask else None


def pre_activation_grad_ref(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    act: str,
    act_param: float,
) -> Tensor:
    """dz = dy·act'(z), or dy where ``mask`` is set; differentiable in all its tensors."""
    dy = dy.to(acc_type(x))
    if mask is not None:
        return torch.where(mask, dy, 0)
    if act == "identity":
        return dy
    z = _pre_activation(x, mean, rstd, weight, bias, residual)
    vjp = torch.func.vjp(lambda z: ACTIVATION_FORMULAS[act](z, act_param), z)[1]
    return vjp(dy)[0]


def bn_backward_reduce_ref(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    act: str,
    act_param: float,
    *,
    write_dz: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """sum_dy = Σ dz, sum_dy_xhat = Σ dz·xhat of each channel, and dz itself if asked."""
    dz = pre_activation_grad_ref(dy, x, mean, rstd, weight, bias, residual, mask, act, act_param)
    xhat = _pre_activation(x, mean, rstd, None, None, None)
    dims = reduced_dims(x)
    return dz.sum(dims), (dz * xhat).sum(dims), dz.to(x.dtype) if write_dz else None


def bn_backward_dx_ref(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    act: str,
    act_param: float,
    sums: tuple[Tensor, Tensor] | None,
    count: int,
    *,
    write_dz: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dx = (dz − (sum_dy + xhat·sum_dy_xhat)/count)·rstd·weight; with no ``sums`` dz·rstd·weight."""
    dz = pre_activation_grad_ref(dy, x, mean, rstd, weight, bias, residual, mask, act, act_param)
    dx = dz
    if sums is not None:
        sum_dy, sum_dy_xhat = (per_channel(s, x) for s in sums)
        dx = dz - (sum_dy + _pre_activation(x, mean, rstd, None, None, None) * sum_dy_xhat) / count
    dx = dx * per_channel(rstd, x)
    if weight is not None:
        dx = dx * per_channel(weight, x)
    return dx.to(x.dtype), dz.to(x.dtype) if write_dz else None
