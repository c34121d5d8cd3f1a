"""Functions in plain, differentiable torch that compute what the kernels' launchers compute.

A launcher is a function that launches kernels. For example, `bn_stats_ref` has the signature of the
launcher `bn_stats`, but without ``out``. Tests compare the kernels with these functions. Double
backward and forward-mode differentiation use them, because torch can differentiate them. In this
module ``mask`` is a tensor of booleans, while the kernels' mask has one bit per element.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.kernels.conv_config import ConvShape
from bnres.kernels.dtypes import acc_type
from bnres.kernels.norm import Norm, RunningStatistics, Statistics, Sums

# Each activation is a function of its input z and a parameter. Only leaky_relu uses the parameter,
# as its slope.
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
    """Returns every dimension except the channel dimension."""
    return [0, *range(2, x.dim())]


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """Returns ``v`` (C,) in the `acc_type` of ``x`` (N, C, *), broadcastable to ``x``."""
    return v.to(acc_type(x)).view(1, -1, *[1] * (x.dim() - 2))


def bn_stats_ref(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    *,
    input_bias: Tensor | None = None,
    counter: Tensor | None = None,
) -> Statistics:
    """Returns mean = E[x] and rstd = 1/sqrt(E[(x − mean)²] + eps) of each channel: (C,).

    ``running_mean`` is updated with E[x + input_bias], and ``running_var`` with the unbiased
    variance.
    """
    dims, count = reduced_dims(x), x[:, 0].numel()
    wide = x.to(acc_type(x))
    mean = wide.mean(dims)
    var = (wide - per_channel(mean, x)).square().mean(dims)
    shifted = mean if input_bias is None else mean + input_bias
    for buffer, stat in ((running_mean, shifted), (running_var, var * count / max(count - 1, 1))):
        if buffer is not None:
            buffer.copy_((1 - momentum) * buffer + momentum * stat.detach())
    if counter is not None:
        counter.add_(1)
    return Statistics(mean, 1 / (var + eps).sqrt())


def bn_moments_ref(x: Tensor) -> Tensor:
    """Returns each channel's count, mean and M2 = Σ(x − mean)²: (3, C). An empty x gives zeros."""
    dims, count = reduced_dims(x), x[:, :1].numel()
    wide = x.to(acc_type(x))
    mean = wide.sum(dims) / max(count, 1)
    m2 = (wide - per_channel(mean, x)).square().sum(dims)
    return torch.stack((torch.full_like(mean, count), mean, m2))


def bn_combine_ref(
    moments: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    *,
    counter: Tensor | None = None,
) -> tuple[Statistics, Tensor]:
    """Returns the statistics over the batches of all ranks, and the total count N.

    A rank is a process. ``moments`` (ranks, 3, C) has the count n_r, mean_r and
    M2_r = Σ(x − mean_r)² of each rank r. Then N = Σ n_r, mean = Σ n_r·mean_r / N and
    var = Σ (M2_r + n_r·(mean_r − mean)²) / N. If N is 0, the running statistics don't change.
    """
    count, means, m2 = moments.double().unbind(1)
    total = count.sum(0)
    n = total.clamp(min=1)
    mean = (count * means).sum(0) / n
    sum_d2 = (m2 + count * (means - mean).square()).sum(0)
    unbiased = sum_d2 / (total - 1).clamp(min=1)
    for buffer, stat in ((running_mean, mean), (running_var, unbiased)):
        if buffer is not None:
            updated = (1 - momentum) * buffer + momentum * stat.detach()
            buffer.copy_(torch.where(total > 0, updated, buffer))
    if counter is not None:
        counter.add_(1)
    rstd = 1 / (sum_d2 / n + eps).sqrt()
    return Statistics(mean.to(moments.dtype), rstd.to(moments.dtype)), total[:1]


def _rstd(x: Tensor, norm: Norm) -> Tensor:
    """Returns 1/sqrt(var + eps), broadcastable to ``x``."""
    statistics = norm.statistics
    if isinstance(statistics, RunningStatistics):
        return 1 / (per_channel(statistics.var, x) + statistics.eps).sqrt()
    return per_channel(statistics.rstd, x)


def _xhat(x: Tensor, norm: Norm) -> Tensor:
    """Returns (x − mean)·rstd."""
    return (x.to(acc_type(x)) - per_channel(norm.statistics.mean, x)) * _rstd(x, norm)


def _normalised(x: Tensor, norm: Norm) -> Tensor:
    """Returns (x − mean)·rstd·weight + bias."""
    z = _xhat(x, norm)
    if norm.weight is not None:
        z = z * per_channel(norm.weight, x)
    if norm.bias is not None:
        z = z + per_channel(norm.bias, x)
    return z


def _pre_activation(
    x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None
) -> Tensor:
    """Returns z = norm(x) + residual_norm(residual).

    If ``residual_norm`` is None, the residual is added unchanged.
    """
    z = _normalised(x, norm)
    if residual is None:
        return z
    return z + (residual if residual_norm is None else _normalised(residual, residual_norm))


def bn_apply_ref(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    act: str,
    act_param: float,
    *,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns y = act(z), where z = norm(x) + residual_norm(residual), and a mask.

    If ``residual_norm`` is None, the residual is added unchanged. The mask is True where z > 0 or z
    is NaN. Without ``save_mask``, the mask is None.
    """
    z = _pre_activation(x, norm, residual, residual_norm)
    y = ACTIVATION_FORMULAS[act](z, act_param).to(x.dtype)
    return y, ~(z <= 0) if save_mask else None


def _pre_activation_grad(
    dy: Tensor, dy_skip: Tensor | None, mask: Tensor | None, act: str, param: float, *inputs: Any
) -> Tensor:
    """Returns dz = (dy + dy_skip)·act'(z).

    act'(z) is 1 where ``mask`` is True and 0 elsewhere. If ``mask`` is None, act'(z) is computed
    from z, the result of `_pre_activation` for the arguments ``inputs``.
    """
    dy = dy.to(acc_type(inputs[0]))
    if dy_skip is not None:
        dy = dy + dy_skip
    if mask is not None:
        return torch.where(mask, dy, 0)
    if act == "identity":
        return dy
    z = _pre_activation(*inputs)
    vjp = torch.func.vjp(lambda z: ACTIVATION_FORMULAS[act](z, param), z)[1]
    return vjp(dy)[0]


def bn_backward_reduce_ref(
    dy: Tensor,
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    mask: Tensor | None,
    act: str,
    act_param: float,
    *,
    dy_skip: Tensor | None = None,
    write_dz: bool = False,
) -> tuple[Sums, Tensor | None]:
    """Returns the sums Σ dz and Σ dz·xhat of each channel, and dz.

    Here dz = (dy + dy_skip)·act'(z) and xhat = (x − mean)·rstd. If ``residual_norm`` is not None,
    the same two sums are also returned with xhat computed from ``residual``. Without ``write_dz``,
    the returned dz is None.
    """
    inputs = x, norm, residual, residual_norm
    dz = _pre_activation_grad(dy, dy_skip, mask, act, act_param, *inputs)
    dims = reduced_dims(x)
    sums = Sums(dz.sum(dims), (dz * _xhat(x, norm)).sum(dims))
    if residual is not None and residual_norm is not None:
        xhat = _xhat(residual, residual_norm)
        sums = sums._replace(residual_dy=sums.dy, residual_dy_xhat=(dz * xhat).sum(dims))
    return sums, dz.to(x.dtype) if write_dz else None


def bn_backward_dx_ref(
    dy: Tensor,
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    mask: Tensor | None,
    act: str,
    act_param: float,
    sums: Sums | None,
    count: int,
    *,
    dy_skip: Tensor | None = None,
    write_dresidual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns dx and dresidual, the gradients of ``x`` and ``residual``.

    Without ``write_dresidual``, dresidual is None. If ``residual_norm`` is None, dresidual is the
    gradient of the activation's input. Otherwise it is computed like dx, but from ``residual``.
    """
    inputs = x, norm, residual, residual_norm
    dz = _pre_activation_grad(dy, dy_skip, mask, act, act_param, *inputs)
    dx = _input_grad(dz, x, norm, sums, count)
    dresidual = None
    if write_dresidual:
        dresidual = dz.to(x.dtype)
        if residual is not None and residual_norm is not None:
            if sums is not None and sums.residual_dy_xhat is not None:
                sums = Sums(sums.dy, sums.residual_dy_xhat)
            dresidual = _input_grad(dz, residual, residual_norm, sums, count)
    return dx, dresidual


def _input_grad(dz: Tensor, x: Tensor, norm: Norm, sums: Sums | None, count: int) -> Tensor:
    """Returns dx = (dz − (sum_dy + xhat·sum_dy_xhat)/count)·rstd·weight.

    If ``sums`` is None, the result is dx = dz·rstd·weight.
    """
    dx = dz
    if sums is not None:
        sum_dy, sum_dy_xhat = (per_channel(s, x) for s in sums[:2])
        dx = dz - (sum_dy + _xhat(x, norm) * sum_dy_xhat) / count
    dx = dx * _rstd(x, norm)
    if norm.weight is not None:
        dx = dx * per_channel(norm.weight, x)
    return dx.to(x.dtype)


def bn_max_pool_ref(
    x: Tensor, norm: Norm, act: str, act_param: float, *, save: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns y = max_pool2d(act(norm(x)), 3, stride=2, padding=1), argmax and x_max.

    argmax is each maximum's position in its window, and x_max is the x at this position. Without
    ``save``, both are None.
    """
    values, _ = bn_apply_ref(x, norm, None, None, act, act_param)
    y, flat = F.max_pool2d(values, 3, stride=2, padding=1, return_indices=True)
    if not save:
        return y, None, None
    down, across = _window_starts(y)
    argmax = 3 * (flat // x.shape[3] - down) + flat % x.shape[3] - across
    return y, argmax, x.flatten(2).gather(2, flat.flatten(2)).view_as(y)


def _window_starts(y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the row (OH, 1) and column (OW,) where each window of the pooled ``y`` starts."""
    oh, ow = (torch.arange(size, device=y.device) for size in y.shape[2:])
    return 2 * oh[:, None] - 1, 2 * ow - 1


def pooled_offsets(argmax: Tensor, width: int) -> Tensor:
    """Returns the offset of each maximum in its plane, from its position ``argmax`` in its window.

    A plane is one channel of a sample, and has ``width`` columns.
    """
    down, across = _window_starts(argmax)
    argmax = argmax.long()
    return (down + argmax // 3) * width + across + argmax % 3


def bn_max_pool_at_ref(x: Tensor, norm: Norm, act: str, act_param: float, argmax: Tensor) -> Tensor:
    """Returns the y of `bn_max_pool_ref`, given the positions ``argmax`` of its maxima."""
    flat = pooled_offsets(argmax, x.shape[3]).flatten(2)
    values, _ = bn_apply_ref(x, norm, None, None, act, act_param)
    return values.flatten(2).gather(2, flat).view(argmax.shape)


def bn_max_pool_backward_dx_ref(
    dy: Tensor,
    argmax: Tensor,
    x: Tensor,
    norm: Norm,
    act: str,
    act_param: float,
    sums: Sums | None,
    count: int,
) -> Tensor:
    """Returns dx for the gradient ``dy`` of the pooled tensor.

    Each element of ``dy`` is first added at the position of its window's maximum. Then
    `bn_backward_dx_ref` computes dx.
    """
    flat = pooled_offsets(argmax, x.shape[3]).flatten(2)
    scattered = torch.zeros(x.shape, dtype=acc_type(x), device=x.device).flatten(2)
    scattered = scattered.scatter_add(2, flat, dy.to(acc_type(x)).flatten(2)).view(x.shape)
    return bn_backward_dx_ref(scattered, x, norm, None, None, None, act, act_param, sums, count)[0]


def conv_bn_act_ref(
    x: Tensor,
    filter: Tensor,
    conv_bias: Tensor | None,
    norm: Norm,
    residual: Tensor | None,
    act: str,
    act_param: float,
    shape: ConvShape,
) -> Tensor:
    """Returns y = act(norm(conv2d(x) + conv_bias) + residual)."""
    y = F.conv2d(
        x.to(acc_type(x)),
        filter.to(acc_type(x)),
        None if conv_bias is None else conv_bias.to(acc_type(x)),
        **shape.options,
    )
    return bn_apply_ref(y, norm, residual, None, act, act_param)[0].to(x.dtype)
