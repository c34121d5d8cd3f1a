"""Two batch norms, their sum and an activation."""

from typing import Any

import torch
from torch import Tensor

from bnres.activations import resolve
from bnres.autograd.apply import apply
from bnres.autograd.dual_batch_norm_act import (
    DualBatchNormActFunction,
)
from bnres.backend import uses_kernels
from bnres.functional.aten import batch_norm_act_aten
from bnres.functional.checks import check_input, check_norm, check_residual
from bnres.functional.prepare import (
    batch_counter,
    dense_pair,
    packed_buffers,
    packed_parameters,
    wants_grad,
)
from bnres.kernels.norm import Norm, Statistics
from bnres.recipes import leave_recipe, recording


def dual_batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    *,
    act: str | type[torch.nn.Module] | None = "relu",
    act_kwargs: dict[str, Any] | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    residual_momentum: float | Tensor = 0.1,
    residual_eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    residual_num_batches_tracked: Tensor | None = None,
    twice: bool = False,
) -> Any:
    """Fused ``act(batch_norm(input) + batch_norm(residual))``, the end of a down-sampling block.

    Args:
        input: as in `batch_norm_act`.
        running_mean, running_var, weight, bias: of the batch norm of ``input``.
        residual: of the shape of ``input``; another dtype promotes the result.
        residual_running_mean, residual_running_var, residual_weight, residual_bias: of the batch
            norm of ``residual``.
        act, act_kwargs, training, twice: as in `batch_norm_act`; ``training`` is for both.
        momentum, eps: of the batch norm of ``input``.
        residual_momentum, residual_eps: of the batch norm of ``residual``.
        num_batches_tracked, residual_num_batches_tracked: of the two, as in `batch_norm_act`.

    Returns:
        A tensor of the shape and memory format of ``input``; with ``twice`` two of them.

    Raises:
        As `batch_norm_act`.
    """
    name, param = resolve(act, act_kwargs)
    check_input(input, training)
    check_norm(input, running_mean, running_var, weight, bias, training)
    check_residual(residual, input.shape, input.device)
    check_input(residual, training, "residual")
    check_norm(
        input, residual_running_mean, residual_running_var, residual_weight, residual_bias,
        training, "residual_",
    )  # fmt: skip
    counters = [
        batch_counter(counter, training, input)
        for counter in (num_batches_tracked, residual_num_batches_tracked)
    ]
    if not uses_kernels(input):
        shortcut = batch_norm_act_aten(
            residual, residual_running_mean, residual_running_var, residual_weight, residual_bias,
            None, "identity", 0.0, training, residual_momentum, residual_eps,
        )  # fmt: skip
        y = batch_norm_act_aten(
            input, running_mean, running_var, weight, bias, shortcut, name, param, training,
            momentum, eps,
        )  # fmt: skip
        return (y, y) if twice else y
    input, other = dense_pair(input, residual)
    needs_grad = wants_grad(input, weight, bias, other, residual_weight, residual_bias)
    separate = twice and needs_grad and not torch.compiler.is_compiling()
    factors = [m if isinstance(m, Tensor) else None for m in (momentum, residual_momentum)]
    momenta = tuple(0.0 if isinstance(m, Tensor) else m for m in (momentum, residual_momentum))
    parameters = packed_parameters(weight, bias, residual_weight, residual_bias)
    with packed_buffers(
        training, running_mean, running_var, residual_running_mean, residual_running_var
    ) as buffers:
        y, y_skip, *statistics = apply(
            DualBatchNormActFunction, input, *parameters[:2], other, *parameters[2:], *buffers[:2],
            counters[0], factors[0], *buffers[2:], counters[1], factors[1], momenta,
            (eps, residual_eps), training, name, param, needs_grad, separate,
        )  # fmt: skip
    outputs = (y, y_skip) if separate else (y,)
    if recording() and needs_grad:

        def make(x_a: Tensor, x_b: Tensor, *channels: Tensor) -> Tensor:
            from bnres.kernels.bn_forward import bn_apply

            weight_a, bias_a, weight_b, bias_b, mean_a, rstd_a, mean_b, rstd_b = channels
            norm_a = Norm(Statistics(mean_a, rstd_a), weight_a, bias_a)
            norm_b = Norm(Statistics(mean_b, rstd_b), weight_b, bias_b)
            return bn_apply(x_a, norm_a, x_b, norm_b, name, param)[0]

        leave_recipe(make, (input, other, *parameters, *statistics), *outputs)
    return (outputs[0], outputs[-1]) if twice else y
