"""torch.autograd.Function wrappers: what is saved, which operator runs, where gradients go."""

from typing import Any

import torch
from torch import Tensor

from bnres import ops
from bnres.activations import FORMULAS


def batch_norm_act_formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: tuple[Tensor, Tensor] | None,
    eps: float,
    act: str,
    act_param: float,
) -> Tensor:
    """The operation in differentiable torch; ``stats`` (mean, rstd) are constants, None: of ``x``."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    dims = [0, *range(2, x.dim())]
    if stats is None:
        mean = x.mean(dims, keepdim=True)
        rstd = ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    else:
        mean, rstd = (s.view(shape) for s in stats)
    z = (x - mean) * rstd
    if weight is not None:
        z = z * weight.view(shape)
    if bias is not None:
        z = z + bias.view(shape)
    if residual is not None:
        z = z + residual
    return FORMULAS[act](z, act_param)


class BatchNormActFunction(torch.autograd.Function):
    """y = act(bn(x) + residual); also returns mean, rstd and mask for its backward."""

    @staticmethod
    def forward(
        x, weight, bias, residual, running_mean, running_var, factor, momentum, training, eps, act,
        act_param, needs_grad,
    ):  # fmt: skip
        run = ops.forward_op if torch.compiler.is_compiling() else ops.forward_impl
        y, mean, rstd, mask = run(
            x, weight, bias, residual, running_mean, running_var, factor, momentum, training, eps,
            act, act_param, needs_grad,
        )  # fmt: skip
        if training and run is ops.forward_impl:
            for buffer in (running_mean, running_var):
                if buffer is not None:
                    torch.autograd.graph.increment_version(buffer)
        return y, mean, rstd, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, bias, residual, *_ = inputs
        training, eps, act, act_param, needs_grad = inputs[8:]
        _, mean, rstd, mask = output
        ctx.mark_non_differentiable(mean, rstd, mask)
        ctx.set_materialize_grads(False)
        has_mask = ops.saves_mask(residual is not None, act, needs_grad)
        keeps_residual = residual is not None and act != "identity" and not has_mask
        ctx.save_for_backward(x, weight, bias, residual if keeps_residual else None, mean, rstd,
                              mask if has_mask else None)  # fmt: skip
        ctx.options = (training, eps, act, act_param)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...] = (None,) * 4
        if dy is not None:
            needs = tuple(ctx.needs_input_grad[:4])
            grads = BatchNormActBackwardFunction.apply(dy, *ctx.saved_tensors, needs, *ctx.options)
        return *grads, *((None,) * 9)


class BatchNormActBackwardFunction(torch.autograd.Function):
    """The gradients of `BatchNormActFunction`, differentiable once more and as often as asked."""

    @staticmethod
    def forward(
        dy, x, weight, bias, residual, mean, rstd, mask, needs, training, eps, act, act_param
    ):
        needs_dx, needs_dweight, needs_dbias, needs_dresidual = needs
        run = ops.backward_op if torch.compiler.is_compiling() else ops.backward_impl
        dx, dz, sum_dy, sum_dy_xhat = run(
            dy, x, weight, bias, residual, mean, rstd, mask, training, act, act_param, needs_dx,
            needs_dresidual and act != "identity", needs_dweight or needs_dbias,
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
        dy, x, weight, bias, residual, mean, rstd, mask, needs, *options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight, bias, residual, mean, rstd, mask)
        ctx.needs, ctx.options = needs, options

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, weight, bias, residual, mean, rstd, mask = ctx.saved_tensors
        training, eps, act, act_param = ctx.options
        create_graph = torch.is_grad_enabled()
        wanted = ctx.needs_input_grad[:5]
        with torch.enable_grad():
            dz = dy
            if mask is not None:
                # The mask tells where relu let the gradient through; relu itself is linear there.
                probe = BatchNormActBackwardFunction.mask_of(mask, x)
                dz = torch.where(probe, dy, 0)
                act = "identity"
            bias_arg = torch.zeros_like(mean) if bias is None else bias
            inner = [t for t in (x, weight, bias_arg, residual) if t is not None]
            inner = [t if t.requires_grad else t.detach().requires_grad_() for t in inner]
            it = iter(inner)
            args: list[Any] = [
                next(it) if t is not None else None for t in (x, weight, bias_arg, residual)
            ]
            offset = None
            if residual is None:
                offset = torch.zeros_like(x).requires_grad_()
                args[3] = offset
            y = batch_norm_act_formula(
                args[0],
                args[1],
                args[2],
                args[3],
                None if training else (mean, rstd),
                eps,
                act,
                act_param,
            )
            sources = [t for t in args if t is not None]
            firsts = dict(
                zip(
                    map(id, sources),
                    torch.autograd.grad(y, sources, dz, create_graph=True, allow_unused=True),
                    strict=True,
                )
            )
            grads = [firsts[id(t)] if t is not None else None for t in args]
            pairs = [
                (g, gg)
                for g, gg in zip(grads, grad_grads, strict=True)
                if g is not None and gg is not None and g.requires_grad
            ]
            targets = [dy, args[0], args[1], args[2] if bias is not None else None,
                       args[3] if residual is not None else None]  # fmt: skip
            chosen = [t for t, w in zip(targets, wanted, strict=True) if w and t is not None]
            results: list[Tensor | None] = [None] * len(chosen)
            if pairs and chosen:
                results = list(
                    torch.autograd.grad(
                        [g for g, _ in pairs],
                        chosen,
                        [gg for _, gg in pairs],
                        create_graph=create_graph,
                        allow_unused=True,
                    )
                )
        it_results = iter(results)
        out = [
            next(it_results) if w and t is not None else None
            for t, w in zip(targets, wanted, strict=True)
        ]
        return *out, *((None,) * 8)

    @staticmethod
    def mask_of(mask: Tensor, x: Tensor) -> Tensor:
        """The 1-bit mask as booleans of the shape of ``x``."""
        from bnres.kernels.bn_backward import bn_backward_dx
        from bnres.kernels.layout import dense

        ones = torch.ones_like(dense(x.detach()))
        unit = torch.ones(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)  # fmt: skip
        passed, _ = bn_backward_dx(
            ones, ones, unit, unit, None, None, None, mask, "relu", 0.0, None, 1
        )
        return passed != 0
