"""y = max_pool2d(act(bn(x))), differentiable."""

from typing import Any

import torch
from torch import Tensor

from bnres.autograd.apply import apply, forward_mode_of
from bnres.autograd.derivatives import (
    Formula,
    Gradients,
    pushforward,
    second_pullback,
    second_pushforward,
)
from bnres.kernels.dtypes import acc_type
from bnres.kernels.norm import Norm, Statistics
from bnres.kernels.reference import bn_max_pool_at_ref, bn_max_pool_ref, bn_stats_ref
from bnres.kernels.window import Window
from bnres.ops import batch_norm_act_max_pool as ops
from bnres.ops.statistics import note_updates

# x, weight and bias.
TENSORS = 3


def _formula(
    statistics: tuple[Tensor, Tensor] | None,
    index: Tensor | None,
    eps: float,
    act: str,
    act_param: float,
    window: list[int],
    ceil_mode: bool,
) -> Formula:
    """y of the three tensors; ``statistics`` are mean and rstd in eval mode, else None.

    Where the maxima lie is said by ``index``, or found.
    """

    def y(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        stats = bn_stats_ref(x, None, None, 0.0, eps) if statistics is None else statistics
        norm = Norm(Statistics(*stats), weight, bias)
        if index is None:
            return bn_max_pool_ref(x, norm, act, act_param, Window(*window), ceil_mode)[0]
        return bn_max_pool_at_ref(x, norm, act, act_param, Window(*window), index)

    return y


class BatchNormActMaxPoolFunction(torch.autograd.Function):
    """y; where its maxima lie, the x there, mean and rstd are for backward."""

    @staticmethod
    def forward(
        x, weight, bias, running_mean, running_var, counter, factor, momentum, training, eps, act,
        act_param, window, ceil_mode, needs_grad,
    ):  # fmt: skip
        run = ops.forward_op if torch.compiler.is_compiling() else ops.forward_impl
        outputs = run(
            x, weight, bias, running_mean, running_var, counter, factor, momentum, training, eps,
            act, act_param, window, ceil_mode, needs_grad,
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            note_updates(training, running_mean, running_var, counter)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *saved)
        ctx.options = inputs[8:14]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Gradients:
        grads: Gradients = (None,) * TENSORS
        if dy is not None:
            needs = tuple(ctx.needs_input_grad[:TENSORS])
            grads = apply(
                BatchNormActMaxPoolBackwardFunction, dy, *ctx.saved_tensors, needs, *ctx.options
            )
        return *grads, *((None,) * 12)


@forward_mode_of(BatchNormActMaxPoolFunction)
class ForwardModeBatchNormActMaxPoolFunction(BatchNormActMaxPoolFunction):
    """`BatchNormActMaxPoolFunction` with a forward-mode derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        BatchNormActMaxPoolFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, running_mean, running_var = ctx.saved_tensors
        training, eps, *options = ctx.options
        statistics = None
        if not training:
            acc = acc_type(tensors[0])
            statistics = running_mean.to(acc), 1 / (running_var.to(acc) + eps).sqrt()
        formula = _formula(statistics, None, eps, *options)
        return pushforward(formula, tensors, tangents[:TENSORS]), None, None, None, None


class BatchNormActMaxPoolBackwardFunction(torch.autograd.Function):
    """The gradients of `BatchNormActMaxPoolFunction`, differentiable as often as asked."""

    @staticmethod
    def forward(
        dy, x, weight, bias, index, x_max, mean, rstd, needs, training, eps, act, act_param,
        window, ceil_mode,
    ):  # fmt: skip
        run = ops.backward_op if torch.compiler.is_compiling() else ops.backward_impl
        dx, sum_dy, sum_dy_xhat = run(
            dy, x, weight, bias, index, x_max, mean, rstd, training, act, act_param, window,
            needs[0], needs[1] or needs[2],
        )  # fmt: skip
        return (
            dx if needs[0] else None,
            sum_dy_xhat.to(weight.dtype) if needs[1] else None,
            sum_dy.to(bias.dtype) if needs[2] else None,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8])
        ctx.options = inputs[9:]
        ctx.computed = [i for i, gradient in enumerate(output) if gradient is not None]

    @staticmethod
    def _formula(ctx: Any) -> tuple[Formula, list[Tensor | None]]:
        """The formula, and its inputs: dy, no second dy, and the tensors."""
        dy, x, weight, bias, index, _, mean, rstd = ctx.saved_tensors
        training, *options = ctx.options
        formula = _formula(None if training else (mean, rstd), index, *options)
        return formula, [dy, None, x, weight, bias]

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Gradients:
        formula, inputs = BatchNormActMaxPoolBackwardFunction._formula(ctx)
        need_dy, *needed = ctx.needs_input_grad[: 1 + TENSORS]
        found = second_pullback(formula, inputs, [need_dy, False, *needed], grad_grads)
        return found[0], *found[2:], *((None,) * 11)


@forward_mode_of(BatchNormActMaxPoolBackwardFunction)
class ForwardModeBatchNormActMaxPoolBackwardFunction(BatchNormActMaxPoolBackwardFunction):
    """`BatchNormActMaxPoolBackwardFunction` with a forward-mode derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        BatchNormActMaxPoolBackwardFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:8])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Gradients:
        formula, inputs = BatchNormActMaxPoolBackwardFunction._formula(ctx)
        given = [tangents[0], None, *tangents[1 : 1 + TENSORS]]
        found = iter(second_pushforward(formula, inputs, given, ctx.computed))
        return tuple(next(found) if i in ctx.computed else None for i in range(TENSORS))
