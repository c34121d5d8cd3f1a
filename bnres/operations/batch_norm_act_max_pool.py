"""max_pool2d(act(batch_norm(x))), the stem of a ResNet."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.activations import resolve
from bnres.backend import uses_kernels
from bnres.kernels.norm import Norm, Sums
from bnres.kernels.outputs import empty_channels, empty_pooled
from bnres.kernels.reference import bn_max_pool_at_ref, bn_max_pool_ref, bn_stats_ref
from bnres.kernels.window import Window
from bnres.operations.arguments import wants_grad
from bnres.operations.aten import batch_norm_act_aten
from bnres.operations.batch_norm_act import batch_norm_act
from bnres.operations.call import Operation, call
from bnres.operations.norms import (
    check_batch_norm,
    empty_statistics,
    launch_statistics,
    of_input_bias,
    parameter_gradients,
    prepare_evaluation,
    rows_of,
    split_momentum,
    state_of,
)
from bnres.operations.operator import Gradients, Maybe, Recording, operator

Size = int | tuple[int, int]


class Inputs(NamedTuple):
    """The tensors that may need gradients."""

    x: Tensor
    weight: Maybe
    bias: Maybe
    input_bias: Maybe


class Buffers(NamedTuple):
    """The tensors without gradients. The device_momentum is a momentum that is a tensor."""

    running_mean: Maybe
    running_var: Maybe
    counter: Maybe
    device_momentum: Maybe


# The buffers that training writes to.
WRITTEN = ("running_mean", "running_var", "counter")


class Spec(NamedTuple):
    """Every argument of a call that is not a tensor; ``window`` has the fields of `Window`."""

    act: str
    act_param: float
    training: bool
    needs_grad: bool
    momentum: float
    eps: float
    window: tuple[int, ...]
    ceil_mode: bool


class Outputs(NamedTuple):
    """y and, for backward, the statistics, each maximum's position in its window, and x there."""

    y: Tensor
    statistics: Maybe
    argmax: Maybe
    x_max: Maybe


class Saved(NamedTuple):
    """What backward reads."""

    x: Tensor
    weight: Maybe
    bias: Maybe
    input_bias: Maybe
    statistics: Maybe
    argmax: Maybe = None
    x_max: Maybe = None


@cache
def window_of(fields: tuple[int, ...]) -> Window:
    """The window of a spec, made once: it takes as long as an allocation."""
    return Window(*fields)


def _allocate(inputs: Inputs, buffers: Buffers, spec: Spec) -> Outputs:
    x, window = inputs.x, window_of(spec.window)
    y = empty_pooled(x, window, spec.ceil_mode)
    if not spec.needs_grad:
        return Outputs(y, None, None, None)
    argmax = torch.empty_like(y, dtype=window.argmax_dtype)
    return Outputs(y, empty_statistics(x, spec), argmax, torch.empty_like(y))


def _forward(inputs: Inputs, buffers: Buffers, spec: Spec, recording: Recording) -> Outputs:
    outputs = _allocate(inputs, buffers, spec)
    if not spec.training:
        buffers = prepare_evaluation(inputs, buffers, spec, outputs.statistics)
    recording.forward.run(_launch_forward, (inputs, buffers, outputs), spec)
    return outputs


def _launch_forward(inputs: Inputs, buffers: Buffers, outputs: Outputs, spec: Spec) -> None:
    """Fills ``outputs``; statistics that are not kept are scratch, or the running ones."""
    from bnres.kernels.bn_pool import bn_max_pool

    x = inputs.x
    y, kept, argmax, x_max = outputs
    row = None if kept is None else rows_of(kept, x)[0]
    statistics = launch_statistics(x, state_of(inputs, buffers, spec), spec.training, row)
    bn_max_pool(
        x, Norm(statistics, inputs.weight, inputs.bias), spec.act, spec.act_param,
        window_of(spec.window), spec.ceil_mode, out=(y, argmax, x_max),
    )  # fmt: skip


def _saved(inputs: Inputs, y: Tensor, kept: Sequence[Any], spec: Spec) -> Saved:
    return Saved(*inputs, *kept)


class Asked(NamedTuple):
    """What backward is to compute."""

    dx: bool
    sums: bool


class Computed(NamedTuple):
    """What it computes."""

    dx: Maybe
    sum_dy: Maybe
    sum_dy_xhat: Maybe


def _allocate_backward(gradients: Gradients, saved: Saved, spec: Spec, asked: Asked) -> Computed:
    x = saved.x
    dx = torch.empty_like(x) if asked.dx else None
    if not (spec.training or asked.sums):
        return Computed(dx, None, None)
    return Computed(dx, *empty_channels(x, 2))


def _backward(
    gradients: Gradients, saved: Saved, spec: Spec, asked: Asked, recording: Recording
) -> Computed:
    computed = _allocate_backward(gradients, saved, spec, asked)
    given = [
        dy
        if dy is None or dy.stride() == saved.argmax.stride()
        else torch.empty_like(saved.x_max).copy_(dy)
        for dy in gradients
    ]
    recording.backward(asked, given).run(_launch_backward, (given, saved, computed), spec)
    return computed


def _launch_backward(gradients: Gradients, saved: Saved, computed: Computed, spec: Spec) -> None:
    """Fills ``computed``. The reduce pass is that of `batch_norm_act`, over the maxima.

    With two gradients, the reduce pass writes dz, and the dx pass reads dz instead of them.
    """
    from bnres.kernels.bn_backward import bn_backward_reduce
    from bnres.kernels.bn_pool import bn_max_pool_backward_dx

    x, argmax, x_max = saved.x, saved.argmax, saved.x_max
    (dy, dy_skip), (dx, *sums) = gradients, computed
    norm = Norm(rows_of(saved.statistics, x)[0], saved.weight, saved.bias)
    act = spec.act, spec.act_param
    if sums[0] is not None:
        dz = None if dy_skip is None else torch.empty_like(x_max)
        bn_backward_reduce(
            dy, x_max, norm, None, None, None, *act, dy_skip=dy_skip, out=(Sums(*sums), dz)
        )  # fmt: skip
        if dz is not None:
            dy, act = dz, ("identity", 0.0)
    if dx is not None:
        bn_max_pool_backward_dx(
            dy, argmax, x, norm, *act, window_of(spec.window), Sums(*sums) if spec.training else None,
            max(x.numel() // max(x.shape[1], 1), 1), out=dx,
        )  # fmt: skip


def _input_gradients(
    dy: Tensor,
    dy_skip: Tensor | None,
    saved: Saved,
    spec: Spec,
    needed: Inputs,
    recording: Recording | None,
) -> Sequence[Tensor | None]:
    sums = needed.weight or needed.bias or (needed.input_bias and not spec.training)
    asked = Asked(bool(needed.x), bool(sums))
    if dy_skip is not None and not (spec.training or asked.sums):
        dy, dy_skip = dy + dy_skip, None  # there is no reduce pass to sum them
    dx, *found = _run_backward(Gradients(dy, dy_skip), saved, spec, asked, recording=recording)
    return dx if needed.x else None, *parameter_gradients(saved, spec, needed, found)


def _formula(saved: Saved, spec: Spec) -> Tensor:
    x, window = saved.x, window_of(spec.window)
    if spec.training:
        statistics = bn_stats_ref(x, None, None, 0.0, spec.eps)
    else:
        statistics = of_input_bias(rows_of(saved.statistics, x)[0], saved.input_bias)
    norm = Norm(statistics, saved.weight, saved.bias)
    if saved.argmax is None:
        return bn_max_pool_ref(x, norm, spec.act, spec.act_param, window, spec.ceil_mode)[0]
    return bn_max_pool_at_ref(x, norm, spec.act, spec.act_param, window, saved.argmax)


def _check(inputs: Inputs, buffers: Buffers, spec: Spec) -> None:
    x, window = inputs.x, Window(*spec.window)
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    check_batch_norm(x, state_of(inputs, buffers, spec), spec.training)
    size = window.output_size(x.shape[2], x.shape[3], spec.ceil_mode)
    if min(size) < 1:
        raise ValueError(f"input of {tuple(x.shape)} is too small: its pooled size is {size}")


def _aten(inputs: Inputs, buffers: Buffers, spec: Spec) -> Tensor:
    norm = state_of(inputs, buffers, spec)
    y = batch_norm_act_aten(inputs.x, norm, spec.training, None, spec.act, spec.act_param)
    window = Window(*spec.window)
    return F.max_pool2d(y, window.kernel_size, **window.options, ceil_mode=spec.ceil_mode)


_run_backward = operator(
    "batch_norm_act_max_pool_backward", _backward, _allocate_backward,
    tensors=(Gradients, Saved), options=(Spec, Asked), outputs=Computed,
)  # fmt: skip

BATCH_NORM_ACT_MAX_POOL = Operation(
    name="batch_norm_act_max_pool",
    Inputs=Inputs,
    Saved=Saved,
    writes=WRITTEN,
    check=_check,
    aten=_aten,
    forward=operator(
        "batch_norm_act_max_pool_forward", _forward, _allocate,
        tensors=(Inputs, Buffers), options=(Spec,), outputs=Outputs, writes=WRITTEN,
    ),
    saved=_saved,
    backward=_input_gradients,
    formula=_formula,
)  # fmt: skip


def batch_norm_act_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    act: str | type[torch.nn.Module] | None = "relu",
    act_kwargs: dict[str, Any] | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    fork: bool = False,
) -> Any:
    """Fused ``max_pool2d(act(batch_norm(input + input_bias)))``, the stem of a ResNet.

    The pooled activation is never written to memory. The values compared are those rounded to the dtype of
    ``input``; the first of equal ones wins and NaN propagates, as in
    `torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W), fp16, bf16, fp32 or fp64, contiguous or channels_last.
        running_mean, running_var, weight, bias, input_bias: as in `batch_norm_act`.
        kernel_size, stride, padding, dilation, ceil_mode: as in
            `torch.nn.functional.max_pool2d`.
        act, act_kwargs, training, momentum, eps, num_batches_tracked, fork: as in
            `batch_norm_act`.

    Returns:
        (N, C, OH, OW) in the dtype and memory format of ``input``; with ``fork`` two of them.

    Raises:
        ValueError: for an input that is not 4-D, a padding of more than half the kernel, a window
            that does not fit, and as `batch_norm_act`.
    """
    name, param = resolve(act, act_kwargs)
    window = window_fields(kernel_size, stride, padding, dilation)
    device_momentum, number = split_momentum(momentum)
    inputs = Inputs(input, weight, bias, input_bias)
    counter = num_batches_tracked if training else None
    buffers = Buffers(running_mean, running_var, counter, device_momentum)
    spec = Spec(name, param, training, wants_grad(*inputs), number, eps, window, ceil_mode)
    *_, padding_h, padding_w, dilation_h, dilation_w = window
    can_miss = (padding_h and dilation_h > 1) or (padding_w and dilation_w > 1)
    if can_miss and uses_kernels(input):
        _check(inputs, buffers, spec)
        # A window may be all padding, for which only torch's pooling defines a result.
        y = batch_norm_act(
            input, running_mean, running_var, weight, bias, input_bias=input_bias, act=act,
            act_kwargs=act_kwargs, training=training, momentum=momentum, eps=eps,
            num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
        y = F.max_pool2d(y, kernel_size, stride, padding, dilation, ceil_mode)
        return (y, y) if fork else y
    return call(BATCH_NORM_ACT_MAX_POOL, inputs, buffers, spec, fork)


def window_fields(
    kernel_size: Size, stride: Size | None, padding: Size, dilation: Size
) -> tuple[int, ...]:
    """The fields of `Window` for a pooling with torch's arguments.

    Raises:
        ValueError: for a size below 1, or a padding of more than half the kernel.
    """
    kernel = _pair("kernel_size", kernel_size, 1)
    pads = _pair("padding", padding, 0)
    if 2 * pads[0] > kernel[0] or 2 * pads[1] > kernel[1]:
        raise ValueError(f"padding must be at most half of kernel_size, got {padding!r}")
    steps = kernel if stride is None else _pair("stride", stride, 1)
    return *kernel, *steps, *pads, *_pair("dilation", dilation, 1)


def _pair(name: str, value: Size, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name} must be one or two numbers from {least} on, got {value!r}")
    return pair[0], pair[1]
