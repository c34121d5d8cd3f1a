"""y = act(bn_a(x_a) + bn_b(x_b)), differentiable."""

from typing import Any

import torch
from torch import Tensor

from bnres.autograd.apply import apply, forward_mode_of
from bnres.autograd.derivatives import (
    Formula,
    Gradients,
    alias,
    pushforward,
    second_pullback,
    second_pushforward,
)
from bnres.kernels.dtypes import acc_type
from bnres.kernels.norm import Norm, Statistics
from bnres.kernels.reference import bn_apply_ref, bn_stats_ref
from bnres.ops import dual_batch_norm_act as ops
from bnres.ops.statistics import note_updates

# x, weight and bias of both.
TENSORS = 6


def _formula(
    statistics: tuple[Tensor, ...] | None, eps: tuple[float, float], act: str, act_param: float
) -> Formula:
    """y of the six tensors; ``statistics`` are mean and rstd of both in eval mode, else None."""

    def y(
        x_a: Tensor,
        weight_a: Tensor | None,
        bias_a: Tensor | None,
        x_b: Tensor,
        weight_b: Tensor | None,
        bias_b: Tensor | None,
    ) -> Tensor:
        if statistics is None:
            stats_a = bn_stats_ref(x_a, None, None, 0.0, eps[0])
            stats_b = bn_stats_ref(x_b, None, None, 0.0, eps[1])
        else:
            mean_a, rstd_a, mean_b, rstd_b = statistics
            stats_a, stats_b = Statistics(mean_a, rstd_a), Statistics(mean_b, rstd_b)
        norm_a, norm_b = Norm(stats_a, weight_a, bias_a), Norm(stats_b, weight_b, bias_b)
        return bn_apply_ref(x_a, norm_a, x_b, norm_b, act, act_param)[0]

    return y


class DualBatchNormActFunction(torch.autograd.Function):
    """y, y again or None, and both means and rstds, which are for backward."""

    @staticmethod
    def forward(
        x_a, weight_a, bias_a, x_b, weight_b, bias_b, running_mean_a, running_var_a, counter_a,
        factor_a, running_mean_b, running_var_b, counter_b, factor_b, momenta, eps, training, act,
        act_param, needs_grad, twice,
    ):  # fmt: skip
        run = ops.forward_op if torch.compiler.is_compiling() else ops.forward_impl
        y, *statistics = run(
            x_a, weight_a, bias_a, x_b, weight_b, bias_b, running_mean_a, running_var_a, counter_a,
            factor_a, running_mean_b, running_var_b, counter_b, factor_b, *momenta, *eps, training,
            act, act_param, needs_grad,
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            note_updates(
                training, running_mean_a, running_var_a, counter_a, running_mean_b, running_var_b,
                counter_b,
            )  # fmt: skip
        return y, alias(y) if twice else None, *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        eps, training, act, act_param = inputs[15:19]
        statistics = output[2:]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *statistics)
        ctx.options = (training, eps, act, act_param)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_skip: Tensor | None, *_: Any) -> Gradients:
        if dy is None:
            dy, dy_skip = dy_skip, None
        grads: Gradients = (None,) * TENSORS
        if dy is not None:
            needs = tuple(ctx.needs_input_grad[:TENSORS])
            grads = apply(
                DualBatchNormActBackwardFunction,
                dy,
                dy_skip,
                *ctx.saved_tensors,
                needs,
                *ctx.options,
            )
        return *grads, *((None,) * 15)


@forward_mode_of(DualBatchNormActFunction)
class ForwardModeDualBatchNormActFunction(DualBatchNormActFunction):
    """`DualBatchNormActFunction` with a forward-mode derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        DualBatchNormActFunction.setup_context(ctx, inputs, output)
        ctx.twice = inputs[-1]
        ctx.save_for_forward(*inputs[:TENSORS], *inputs[6:8], *inputs[10:12])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, running = ctx.saved_tensors[:TENSORS], ctx.saved_tensors[TENSORS:]
        training, eps, act, act_param = ctx.options
        statistics = None
        if not training:
            acc = acc_type(tensors[0])
            statistics = tuple(
                1 / (buffer.to(acc) + eps[i // 2]).sqrt() if i % 2 else buffer.to(acc)
                for i, buffer in enumerate(running)
            )
        formula = _formula(statistics, eps, act, act_param)
        dy = pushforward(formula, tensors, tangents[:TENSORS])
        return dy, dy.view_as(dy) if ctx.twice else None, None, None, None, None


class DualBatchNormActBackwardFunction(torch.autograd.Function):
    """The gradients of `DualBatchNormActFunction`, differentiable as often as asked."""

    @staticmethod
    def forward(
        dy, dy_skip, x_a, weight_a, bias_a, x_b, weight_b, bias_b, mean_a, rstd_a, mean_b, rstd_b,
        needs, training, eps, act, act_param,
    ):  # fmt: skip
        run = ops.backward_op if torch.compiler.is_compiling() else ops.backward_impl
        dx_a, dx_b, sum_dy, sum_a, sum_b = run(
            dy, dy_skip, x_a, weight_a, bias_a, x_b, weight_b, bias_b, mean_a, rstd_a, mean_b,
            rstd_b, training, act, act_param, needs[0] or needs[3],
            needs[1] or needs[2] or needs[4] or needs[5],
        )  # fmt: skip
        return (
            dx_a if needs[0] else None,
            sum_a.to(weight_a.dtype) if needs[1] else None,
            sum_dy.to(bias_a.dtype) if needs[2] else None,
            dx_b if needs[3] else None,
            sum_b.to(weight_b.dtype) if needs[4] else None,
            sum_dy.to(bias_b.dtype, copy=True) if needs[5] else None,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, _needs, training, eps, act, act_param = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.options = (training, eps, act, act_param)
        ctx.computed = [i for i, gradient in enumerate(output) if gradient is not None]

    @staticmethod
    def _formula(ctx: Any) -> Formula:
        training, *options = ctx.options
        statistics = None if training else ctx.saved_tensors[2 + TENSORS :]
        return _formula(statistics, *options)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Gradients:
        found = second_pullback(
            DualBatchNormActBackwardFunction._formula(ctx),
            ctx.saved_tensors[: 2 + TENSORS],
            ctx.needs_input_grad[: 2 + TENSORS],
            grad_grads,
        )
        return *found, *((None,) * 9)


@forward_mode_of(DualBatchNormActBackwardFunction)
class ForwardModeDualBatchNormActBackwardFunction(DualBatchNormActBackwardFunction):
    """`DualBatchNormActBackwardFunction` with a forward-mode derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        DualBatchNormActBackwardFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:12])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Gradients:
        n = 2 + TENSORS
        found = iter(
            second_pushforward(
                DualBatchNormActBackwardFunction._formula(ctx),
                ctx.saved_tensors[:n],
                tangents[:n],
                ctx.computed,
            )
        )
        return tuple(next(found) if i in ctx.computed else None for i in range(TENSORS))
