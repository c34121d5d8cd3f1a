"""FlagGems' batch norm in Triton, followed by torch's addition and ReLU."""

import importlib

import torch
from torch import Tensor

from benchmarks.cases import OpCase
from benchmarks.operations import EPS, MOMENTUM, Inputs
from benchmarks.providers.base import (
    Bind,
    Implementation,
    Provider,
    Results,
    Unavailable,
    needs_training_norm,
)


def _prepare(case: OpCase) -> Bind:
    needs_training_norm(case)
    if not torch.cuda.is_available():
        raise Unavailable("needs a GPU")
    try:
        # An import statement would not return the module. The package has a function of the same
        # name, which hides the module.
        gems = importlib.import_module("flag_gems.ops.batch_norm")
    except Exception as error:  # the import queries the GPU and runs tools
        raise Unavailable(f"flag_gems can't be imported: {error}") from error
    has_relu = case.site.operation != "bn"

    def bind(inputs: Inputs) -> Implementation:
        x, norm = inputs.x.detach(), inputs.norm
        weight, bias = norm.weight.detach(), norm.bias.detach()
        kept: list[Tensor] = []

        @torch.no_grad()
        def forward() -> Results:
            y, mean, rstd = gems.batch_norm(x, weight, bias, *norm.buffers, True, MOMENTUM, EPS)
            if inputs.residual is not None:
                y.add_(inputs.residual)
            y = y.relu_() if has_relu else y
            kept[:] = [y, mean, rstd]
            return (y,)

        @torch.no_grad()
        def backward() -> Results:
            if not kept:
                forward()
            y, mean, rstd = kept
            (gradient,) = inputs.gradients
            if has_relu:
                gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
            found = gems.batch_norm_backward(
                gradient, x, weight, *norm.buffers, mean, rstd, True, EPS, [True, True, True]
            )
            return [*found] if inputs.residual is None else [*found, gradient]

        return Implementation(
            forward, backward, "batch norm by FlagGems, addition and ReLU by torch"
        )

    return bind


FLAG_GEMS = Provider("flag_gems", _prepare)
