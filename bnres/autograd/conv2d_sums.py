"""conv2d(x) and sums of it, differentiable by torch's own convolution."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.autograd.apply import forward_mode_of
from bnres.kernels.conv_config import ConvShape
from bnres.ops import conv2d_sums as ops


class Conv2dSumsFunction(torch.autograd.Function):
    """y, and sums of it for a batch norm, whose derivative covers what hangs on them."""

    @staticmethod
    def forward(x, filter, shape, config):
        run = ops.forward_op if torch.compiler.is_compiling() else ops.forward_impl
        return run(x, filter, shape.as_list(), config.as_list())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, filter, shape, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, filter)
        ctx.shape = shape

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        x, filter = ctx.saved_tensors
        stride, padding, dilation = _options(ctx.shape)
        dx, dfilter, _bias = torch.ops.aten.convolution_backward(
            dy, x, filter, None, stride, padding, dilation, False, [0, 0], 1,
            [*ctx.needs_input_grad[:2], False],
        )  # fmt: skip
        return dx, dfilter, None, None


@forward_mode_of(Conv2dSumsFunction)
class ForwardModeConv2dSumsFunction(Conv2dSumsFunction):
    """`Conv2dSumsFunction` with a forward-mode derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        Conv2dSumsFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dfilter: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None]:
        x, filter = ctx.saved_tensors
        options = _options(ctx.shape)
        dy = None if dx is None else F.conv2d(dx, filter, None, *options)
        if dfilter is not None:
            of_filter = F.conv2d(x, dfilter, None, *options)
            dy = of_filter if dy is None else dy + of_filter
        return dy, None


def _options(shape: ConvShape) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation."""
    return (
        [shape.stride_h, shape.stride_w],
        [shape.padding_h, shape.padding_w],
        [shape.dilation_h, shape.dilation_w],
    )
