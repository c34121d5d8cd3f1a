"""The launchers' signatures in plain, differentiable torch, written from the formulas.

Tests hold the kernels against them; the double backward and forward-mode derivatives differentiate
them. The one difference in form: where a kernel keeps one bit an element, ``mask`` is a tensor of
booleans here.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.kernels.conv_config import ConvShape
from bnres.kernels.dtypes import acc_type
from bnres.kernels.norm import Norm
from bnres.kernels.window import Window

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
    *,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """mean = E[x], rstd = 1/sqrt(E[(x − mean)²] + eps); running buffers with the unbiased variance."""
    dims, count = reduced_dims(x), x[:, 0].numel()
    wide = x.to(acc_type(x))
    mean = wide.mean(dims)
    var = (wide - per_channel(mean, x)).square().mean(dims)
    for buffer, stat in ((running_mean, mean), (running_var, var * count / max(count - 1, 1))):
        if buffer is not None:
            buffer.copy_((1 - momentum) * buffer + momentum * stat.detach())
    if counter is not None:
        counter.add_(1)
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
    dy_skip: Tensor | None = None,
    write_dz: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """sum_dy = Σ dz, sum_dy_xhat = Σ dz·xhat of each channel, and dz itself if asked."""
    dy = dy if dy_skip is None else dy.to(acc_type(x)) + dy_skip
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
    dy_skip: Tensor | None = None,
    write_dz: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dx = (dz − (sum_dy + xhat·sum_dy_xhat)/count)·rstd·weight; with no ``sums`` dz·rstd·weight."""
    dy = dy if dy_skip is None else dy.to(acc_type(x)) + dy_skip
    dz = pre_activation_grad_ref(dy, x, mean, rstd, weight, bias, residual, mask, act, act_param)
    dx = dz
    if sums is not None:
        sum_dy, sum_dy_xhat = (per_channel(s, x) for s in sums)
        dx = dz - (sum_dy + _pre_activation(x, mean, rstd, None, None, None) * sum_dy_xhat) / count
    dx = dx * per_channel(rstd, x)
    if weight is not None:
        dx = dx * per_channel(weight, x)
    return dx.to(x.dtype), dz.to(x.dtype) if write_dz else None


def _dual_pre_activation(x_a: Tensor, x_b: Tensor, norm_a: Norm, norm_b: Norm) -> Tensor:
    """z = bn_a(x_a) + bn_b(x_b)."""
    return _pre_activation(x_a, *norm_a, _pre_activation(x_b, *norm_b, None))


def bn_dual_apply_ref(
    x_a: Tensor,
    x_b: Tensor,
    norm_a: Norm,
    norm_b: Norm,
    act: str,
    act_param: float,
    *,
    eps: tuple[float, float] | None = None,
) -> Tensor:
    """y = act(bn_a(x_a) + bn_b(x_b)); with ``eps``, the norms' rstd are variances."""
    if eps is not None:
        norm_a, norm_b = (
            norm._replace(rstd=1 / (norm.rstd.to(acc_type(x_a)) + e).sqrt())
            for norm, e in zip((norm_a, norm_b), eps, strict=True)
        )
    z = _dual_pre_activation(x_a, x_b, norm_a, norm_b)
    return ACTIVATION_FORMULAS[act](z, act_param).to(x_a.dtype)


def _dual_pre_activation_grad(
    dy: Tensor,
    dy_skip: Tensor | None,
    x_a: Tensor,
    x_b: Tensor,
    norm_a: Norm,
    norm_b: Norm,
    act: str,
    act_param: float,
) -> Tensor:
    """dz = (dy + dy_skip)·act'(z)."""
    dy = dy.to(acc_type(x_a)) if dy_skip is None else dy.to(acc_type(x_a)) + dy_skip
    z = _dual_pre_activation(x_a, x_b, norm_a, norm_b)
    return torch.func.vjp(lambda z: ACTIVATION_FORMULAS[act](z, act_param), z)[1](dy)[0]


def bn_dual_backward_reduce_ref(
    dy: Tensor,
    dy_skip: Tensor | None,
    x_a: Tensor,
    x_b: Tensor,
    norm_a: Norm,
    norm_b: Norm,
    act: str,
    act_param: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ dz, Σ dz·xhat_a and Σ dz·xhat_b of each channel."""
    dz = _dual_pre_activation_grad(dy, dy_skip, x_a, x_b, norm_a, norm_b, act, act_param)
    dims = reduced_dims(x_a)
    xhats = (
        _pre_activation(x, norm.mean, norm.rstd, None, None, None)
        for x, norm in ((x_a, norm_a), (x_b, norm_b))
    )
    sum_a, sum_b = ((dz * xhat).sum(dims) for xhat in xhats)
    return dz.sum(dims), sum_a, sum_b


def bn_dual_backward_dx_ref(
    dy: Tensor,
    dy_skip: Tensor | None,
    x_a: Tensor,
    x_b: Tensor,
    norm_a: Norm,
    norm_b: Norm,
    act: str,
    act_param: float,
    sums: tuple[Tensor, Tensor, Tensor] | None,
    count: int,
) -> tuple[Tensor, Tensor]:
    """dx_a and dx_b, each as `bn_backward_dx_ref` of dz."""
    dz = _dual_pre_activation_grad(dy, dy_skip, x_a, x_b, norm_a, norm_b, act, act_param)
    linear = (None, None, None, "identity", 0.0)
    pairs = (None, None) if sums is None else ((sums[0], sums[1]), (sums[0], sums[2]))
    dx_a, dx_b = (
        bn_backward_dx_ref(dz, x, norm.mean, norm.rstd, norm.weight, *linear, pair, count)[0]
        for x, norm, pair in zip((x_a, x_b), (norm_a, norm_b), pairs, strict=True)
    )
    return dx_a, dx_b


def bn_max_pool_ref(
    x: Tensor,
    norm: Norm,
    act: str,
    act_param: float,
    window: Window,
    ceil_mode: bool,
    *,
    save: bool = False,
    eps: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = max_pool2d(act(bn(x))); the position of each maximum in its window, and the x there."""
    values, _ = bn_apply_ref(x, *norm, None, act, act_param, eps=eps)
    y, flat = F.max_pool2d(
        values,
        (window.kernel_h, window.kernel_w),
        (window.stride_h, window.stride_w),
        (window.padding_h, window.padding_w),
        (window.dilation_h, window.dilation_w),
        ceil_mode,
        return_indices=True,
    )
    if not save:
        return y, None, None
    down, across = window_starts(y, window)
    kh = (flat // x.shape[3] - down) // window.dilation_h
    kw = (flat % x.shape[3] - across) // window.dilation_w
    return y, kh * window.kernel_w + kw, x.flatten(2).gather(2, flat.flatten(2)).view_as(y)


def window_starts(y: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Row (OH, 1) and column (OW,) where each window of the pooled ``y`` starts."""
    oh, ow = (torch.arange(size, device=y.device) for size in y.shape[2:])
    return (
        (oh * window.stride_h - window.padding_h)[:, None],
        ow * window.stride_w - window.padding_w,
    )


def pooled_offsets(index: Tensor, window: Window, width: int) -> Tensor:
    """Where in a plane of this width each maximum lies, of its position in its window."""
    down, across = window_starts(index, window)
    index = index.long()
    h = down + index // window.kernel_w * window.dilation_h
    return h * width + across + index % window.kernel_w * window.dilation_w


def bn_max_pool_at_ref(
    x: Tensor, norm: Norm, act: str, act_param: float, window: Window, index: Tensor
) -> Tensor:
    """`bn_max_pool_ref` where the maxima are known to lie at ``index``: differentiable."""
    flat = pooled_offsets(index, window, x.shape[3]).flatten(2)
    values, _ = bn_apply_ref(x, *norm, None, act, act_param)
    return values.flatten(2).gather(2, flat).view(index.shape)


def bn_max_pool_backward_dx_ref(
    dy: Tensor,
    index: Tensor,
    x: Tensor,
    norm: Norm,
    act: str,
    act_param: float,
    window: Window,
    sums: tuple[Tensor, Tensor] | None,
    count: int,
) -> Tensor:
    """dx as `bn_backward_dx_ref`, of dy summed where the maxima lie."""
    flat = pooled_offsets(index, window, x.shape[3]).flatten(2)
    scattered = torch.zeros(x.shape, dtype=acc_type(x), device=x.device).flatten(2)
    scattered = scattered.scatter_add(2, flat, dy.to(acc_type(x)).flatten(2)).view(x.shape)
    return bn_backward_dx_ref(scattered, x, *norm, None, None, act, act_param, sums, count)[0]


def conv_bn_act_ref(
    x: Tensor,
    filter: Tensor,
    conv_bias: Tensor | None,
    norm: Norm,
    eps: float,
    residual: Tensor | None,
    act: str,
    act_param: float,
    shape: ConvShape,
) -> Tensor:
    """y = act(bn(conv2d(x) + conv_bias) + residual); the norm's rstd is a variance."""
    y = F.conv2d(
        x.to(acc_type(x)),
        filter.to(acc_type(x)),
        None if conv_bias is None else conv_bias.to(acc_type(x)),
        (shape.stride_h, shape.stride_w),
        (shape.padding_h, shape.padding_w),
        (shape.dilation_h, shape.dilation_w),
    )
    y = bn_apply_ref(y, *norm, None, "identity", 0.0, eps=eps)[0]
    if residual is not None:
        y = y + residual
    return ACTIVATION_FORMULAS[act](y, act_param).to(x.dtype)
