"""A convolution's bias in front of a batch norm that normalises by its batch."""

from typing import Any

import torch
from torch import Tensor

from bnres.autograd.apply import forward_mode_of


class CancelledBiasFunction(torch.autograd.Function):
    """``x`` itself; the bias, which cancels in the batch norm's output, has a gradient of zeros."""

    @staticmethod
    def forward(x: Tensor, conv_bias: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        zeros = torch.zeros_like(ctx.saved_tensors[0]) if ctx.needs_input_grad[1] else None
        return dy, zeros


@forward_mode_of(CancelledBiasFunction)
class ForwardModeCancelledBiasFunction(CancelledBiasFunction):
    """`CancelledBiasFunction` with a forward-mode derivative."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, _: Tensor | None) -> Tensor | None:
        return None if dx is None else dx.view_as(dx)
