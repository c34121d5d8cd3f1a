"""y = act(bn(x) + residual), differentiable."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnres.autograd.apply import apply, forward_mode_of
from bnres.autograd.derivatives import Gradients, alias, jvp
from bnres.kernels.dtypes import acc_type
from bnres.kernels.norm import Norm, Statistics
from bnres.kernels.reference import (
    bn_backward_dx_ref,
    bn_backward_reduce_ref,
    bn_stats_ref,
    per_channel,
    pre_activation_grad_ref,
)
from bnres.ops import batch_norm_act as ops
from bnres.ops.statistics import note_updates


class BatchNormActFunction(torch.autograd.Function):
    """y, y again or None, and mean, rstd and mask, which are for backward.

    Handed out twice, y takes the gradients of the two tensors unsummed, and the reduce pass sums
    them; the tensors share their memory.
    """

    @staticmethod
    def forward(
        x, weight, bias, residual, running_mean, running_var, counter, factor, momentum, training,
        eps, act, act_param, needs_grad, twice,
    ):  # fmt: skip
        run = ops.forward_op if torch.compiler.is_compiling() else ops.forward_impl
        y, mean, rstd, mask = run(
            x, weight, bias, residual, running_mean, running_var, counter, factor, momentum,
            training, eps, act, act_param, needs_grad,
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            note_updates(training, running_mean, running_var, counter)
        return y, alias(y) if twice else None, mean, rstd, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, bias, residual, *_, needs_grad, _twice = inputs
        training, eps, act, act_param = inputs[9:13]
        mean, rstd, mask = output[2:]
        ctx.mark_non_differentiable(mean, rstd, mask)
        ctx.set_materialize_grads(False)
        has_mask = ops.saves_mask(residual is not None, act, needs_grad)
        if has_mask or act == "identity":
            residual = None
        ctx.save_for_backward(x, weight, bias, residual, mean, rstd, mask if has_mask else None)
        ctx.options = (training, eps, act, act_param)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_skip: Tensor | None, *_: Any) -> Gradients:
        if dy is None:
            dy, dy_skip = dy_skip, None
        grads: Gradients = (None,) * 4
        if dy is not None:
            needs = tuple(ctx.needs_input_grad[:4])
            grads = apply(
                BatchNormActBackwardFunction, dy, dy_skip, *ctx.saved_tensors, needs, *ctx.options
            )
        return *grads, *((None,) * 11)


@forward_mode_of(BatchNormActFunction)
class ForwardModeBatchNormActFunction(BatchNormActFunction):
    """`BatchNormActFunction` with a forward-mode derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        BatchNormActFunction.setup_context(ctx, inputs, output)
        ctx.twice = inputs[-1]
        ctx.save_for_forward(*inputs[:6])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, running_mean, running_var = ctx.saved_tensors
        training, eps, act, act_param = ctx.options
        if training:
            statistics = bn_stats_ref(x, None, None, 0.0, eps)
        else:
            rstd = 1 / (running_var.to(acc_type(x)) + eps).sqrt()
            statistics = Statistics(running_mean.to(acc_type(x)), rstd)
        norm = Norm(statistics, weight, bias)
        dx, dweight, dbias, dresidual = tangents[:4]
        dz = torch.zeros_like(x, dtype=acc_type(x))
        if dx is not None:
            # The derivative of xhat by x is symmetric: backward's formula serves both ways.
            linear = (norm, None, None, None, "identity", 0.0)
            sums = bn_backward_reduce_ref(dx, x, *linear)[0] if training else None
            dz = dz + bn_backward_dx_ref(dx, x, *linear, sums, x[:, 0].numel())[0]
        if dweight is not None:
            mean, rstd = (per_channel(s, x) for s in statistics)
            xhat = (x - mean) * rstd
            dz = dz + xhat * per_channel(dweight, x)
        if dbias is not None:
            dz = dz + per_channel(dbias, x)
        if dresidual is not None:
            dz = dz + dresidual
        dy = pre_activation_grad_ref(dz, x, norm, residual, None, None, act, act_param)
        dy = dy.to(x.dtype)
        return dy, dy.view_as(dy) if ctx.twice else None, None, None, None


class BatchNormActBackwardFunction(torch.autograd.Function):
    """The gradients of `BatchNormActFunction`, differentiable as often as asked."""

    @staticmethod
    def forward(
        dy, dy_skip, x, weight, bias, residual, mean, rstd, mask, needs, training, eps, act,
        act_param,
    ):  # fmt: skip
        needs_dx, needs_dweight, needs_dbias, needs_dresidual = needs
        if dy_skip is not None and act == "identity":
            dy, dy_skip = dy + dy_skip, None
        run = ops.backward_op if torch.compiler.is_compiling() else ops.backward_impl
        dx, dz, sum_dy, sum_dy_xhat = run(
            dy, dy_skip, x, weight, bias, residual, mean, rstd, mask, training, act, act_param,
            needs_dx, needs_dresidual and act != "identity", needs_dweight or needs_dbias,
        )  # fmt: skip
        dresidual = None
        if needs_dresidual:
            dresidual = dy.view_as(dy) if act == "identity" else dz
        return (
            dx if needs_dx else None,
            sum_dy_xhat.to(weight.dtype) if needs_dweight else None,
            sum_dy.to(bias.dtype) if needs_dbias else None,
            dresidual,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, _needs, training, eps, act, act_param = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.options = (training, eps, act, act_param)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Gradients:
        wanted = [i for i, grad_grad in enumerate(grad_grads) if grad_grad is not None]
        if not wanted:
            return (None,) * 14
        needed = ctx.needs_input_grad[:6]
        gradients, sources = _gradients_of(ctx.saved_tensors, needed, wanted, *ctx.options)
        vjp = torch.func.vjp(gradients, *sources)[1]
        found = iter(vjp([grad_grads[i] for i in wanted]))
        return *(next(found) if need else None for need in needed), *((None,) * 8)


@forward_mode_of(BatchNormActBackwardFunction)
class ForwardModeBatchNormActBackwardFunction(BatchNormActBackwardFunction):
    """`BatchNormActBackwardFunction` with a forward-mode derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        BatchNormActBackwardFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:9])
        ctx.computed = [i for i, gradient in enumerate(output) if gradient is not None]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Gradients:
        needed = [tangent is not None for tangent in tangents[:6]]
        gradients, sources = _gradients_of(ctx.saved_tensors, needed, ctx.computed, *ctx.options)
        given = tuple(t for t in tangents[:6] if t is not None)
        found = iter(jvp(gradients, sources, given))
        return tuple(next(found) if i in ctx.computed else None for i in range(4))


def _gradients_of(
    saved: Sequence[Any],
    needed: Sequence[bool],
    wanted: Sequence[int],
    *options: Any,
) -> tuple[Callable[..., list[Tensor | None]], tuple[Tensor, ...]]:
    """The ``wanted`` gradients as a function of the saved tensors that are ``needed``; and those."""
    *tensors, mean, rstd, mask = saved
    x = tensors[2]
    if mask is not None:
        mask = ops.unpack_mask(mask, x)

    def gradients(*sources: Tensor) -> list[Tensor | None]:
        remaining = iter(sources)
        dy, dy_skip, x, weight, bias, residual = (
            next(remaining) if need else t for t, need in zip(tensors, needed, strict=True)
        )
        if dy_skip is not None:
            dy = dy + dy_skip
        every = _differentiable_gradients(dy, x, weight, bias, residual, mean, rstd, mask, *options)
        return [every[i] for i in wanted]

    sources = [t for t, need in zip(tensors, needed, strict=True) if need]
    return gradients, tuple(sources)


def _differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    training: bool,
    eps: float,
    act: str,
    act_param: float,
) -> Gradients:
    """dx, dweight, dbias, dresidual as functions of the tensors they come from."""
    statistics = bn_stats_ref(x, None, None, 0.0, eps) if training else Statistics(mean, rstd)
    norm = Norm(statistics, weight, bias)
    dz = pre_activation_grad_ref(dy, x, norm, residual, None, mask, act, act_param)
    linear = (norm, None, None, None, "identity", 0.0)
    sums, _ = bn_backward_reduce_ref(dz, x, *linear)
    dx, _ = bn_backward_dx_ref(dz, x, *linear, sums if training else None, x[:, 0].numel())
    return (
        dx,
        None if weight is None else sums.dy_xhat.to(weight.dtype),
        None if bias is None else sums.dy.to(bias.dtype),
        dz.to(x.dtype),
    )
