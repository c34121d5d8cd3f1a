"""Fused batch norm and activation, with an optional residual or max-pool.

A call computes one of these expressions:

- act(batch_norm(x))
- act(batch_norm(x) + residual)
- act(batch_norm(x) + batch_norm(residual)), where the second batch norm is ``residual_norm``
- max_pool2d(act(batch_norm(x)))
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.activations import resolve
from bnres.kernels.dtypes import acc_type
from bnres.kernels.layout import dense, dense_like
from bnres.kernels.norm import Norm, Statistics, Sums
from bnres.kernels.outputs import empty_channels, empty_mask, empty_pooled
from bnres.kernels.reference import (
    bn_apply_ref,
    bn_max_pool_at_ref,
    bn_max_pool_ref,
    bn_stats_ref,
)
from bnres.kernels.torch_internals import outside_of_transforms, unwrapped
from bnres.operations.arguments import as_dtype_of, check_residual, wants_grad
from bnres.operations.aten import batch_norm_act_aten
from bnres.operations.call import Operation, call
from bnres.operations.norms import (
    BatchNormState,
    check_batch_norm,
    empty_statistics,
    launch_statistics,
    of_input_bias,
    prepare_evaluation,
    rows_of,
    split_momentum,
    states_of,
)
from bnres.operations.operator import Gradients, Maybe, Recording, operator


class Inputs(NamedTuple):
    """The tensors that may need gradients."""

    x: Tensor
    weight: Maybe
    bias: Maybe
    input_bias: Maybe
    residual: Maybe = None
    residual_weight: Maybe = None
    residual_bias: Maybe = None
    residual_input_bias: Maybe = None


class Buffers(NamedTuple):
    """The tensors that never get gradients.

    ``counter`` is num_batches_tracked. ``device_momentum`` is the momentum if it is a tensor. If it
    is a number, it is stored in `Spec`.
    """

    running_mean: Maybe
    running_var: Maybe
    counter: Maybe
    device_momentum: Maybe
    residual_running_mean: Maybe = None
    residual_running_var: Maybe = None
    residual_counter: Maybe = None
    residual_device_momentum: Maybe = None


# The fields of `Inputs` and `Buffers` must stay in this order, because `states_of` and other
# functions read them by position.

# The names of the buffers that training writes to.
WRITTEN = tuple(name for name in Buffers._fields if not name.endswith("device_momentum"))


class Spec(NamedTuple):
    """The arguments of a call that are not tensors, and two facts about its backward pass.

    - ``needs_grad``: whether backward may run.
    - ``reads_x``: whether backward reads the values of x.
    - ``pools``: whether the call ends with the max-pool of a ResNet's stem, which has a 3×3 window,
      stride 2 and padding 1. A call with this max-pool has no residual.
    - ``group``: name of the process group of a synchronised batch norm, otherwise an empty string.
    """

    act: str
    act_param: float
    training: bool
    needs_grad: bool
    reads_x: bool
    momentum: float
    eps: float
    has_residual_norm: bool
    residual_momentum: float
    residual_eps: float
    pools: bool
    group: str = ""


class Outputs(NamedTuple):
    """y, and the tensors kept for backward. A tensor that is not kept is None.

    - ``statistics``: the mean and rstd = 1/sqrt(var + eps) of each batch norm.
    - ``mask``: one bit per element of y, which is 1 where the derivative of relu is 1.
    - ``argmax``: the position of each maximum in its window, if the call ends with a max-pool.
    - ``x_max``: the value of x at each of these positions.
    """

    y: Tensor
    statistics: Maybe
    mask: Maybe
    argmax: Maybe = None
    x_max: Maybe = None


class Saved(NamedTuple):
    """The tensors that backward reads.

    The field ``x`` has the tensor x only if backward reads its values. Otherwise the field has y if
    there is a mask, because the kernel that reads the mask needs the shape and strides of x, and y
    has the same ones. Without a mask the field is None.

    ``total`` (1,) is the number of values per channel, summed over all processes, or None if the
    batch norm is not synchronised.
    """

    x: Maybe
    weight: Maybe
    bias: Maybe
    input_bias: Maybe
    residual: Maybe
    residual_weight: Maybe
    residual_bias: Maybe
    residual_input_bias: Maybe
    statistics: Maybe
    mask: Maybe = None
    argmax: Maybe = None
    x_max: Maybe = None
    total: Maybe = None


def _saves_mask(inputs: Inputs, spec: Spec) -> bool:
    """Whether forward saves a mask, so that relu's derivative needs neither x nor the residual."""
    added = inputs.residual is not None and not spec.has_residual_norm
    return spec.needs_grad and spec.act == "relu" and (added or not spec.reads_x)


def _allocate(inputs: Inputs, buffers: Buffers, spec: Spec) -> Outputs:
    x = inputs.x
    statistics = empty_statistics(x, spec) if spec.needs_grad else None
    if not spec.pools:
        mask = empty_mask(x) if _saves_mask(inputs, spec) else None
        return Outputs(torch.empty_like(x), statistics, mask)
    y = empty_pooled(x)
    if not spec.needs_grad:
        return Outputs(y, None, None)
    argmax = torch.empty_like(y, dtype=torch.uint8)
    return Outputs(y, statistics, None, argmax, torch.empty_like(y))


def _forward(inputs: Inputs, buffers: Buffers, spec: Spec, recording: Recording) -> Outputs:
    outputs = _allocate(inputs, buffers, spec)
    if not spec.training:
        buffers = prepare_evaluation(inputs, buffers, spec, outputs.statistics)
    recording.forward.run(_launch_forward, (inputs, buffers, outputs), spec)
    return outputs


def _norms(saved: Inputs | Saved, statistics: Any) -> tuple[Norm, Norm | None]:
    """Returns the batch norm of x and the batch norm of the residual, which may be None.

    ``statistics`` has one item for each batch norm.
    """
    norm, *others = statistics
    residual_norm = Norm(others[0], saved.residual_weight, saved.residual_bias) if others else None
    return Norm(norm, saved.weight, saved.bias), residual_norm


def _launch_forward(inputs: Inputs, buffers: Buffers, outputs: Outputs, spec: Spec) -> None:
    """Computes the values of ``outputs``.

    In evaluation `prepare_evaluation` has already computed ``outputs.statistics``.
    """
    from bnres.kernels.bn_forward import bn_apply
    from bnres.kernels.bn_max_pool import bn_max_pool

    y, kept, mask, argmax, x_max = outputs
    act = spec.act, spec.act_param
    states = states_of(inputs, buffers, spec)
    rows: Any = [None] * len(states) if kept is None else rows_of(kept, inputs.x)
    norm, residual_norm = _norms(
        inputs,
        [
            launch_statistics(t, state, spec.training, row)
            for t, state, row in zip((inputs.x, inputs.residual), states, rows, strict=False)
        ],
    )
    if spec.pools:
        bn_max_pool(inputs.x, norm, *act, out=(y, argmax, x_max))
    else:
        bn_apply(inputs.x, norm, inputs.residual, residual_norm, *act, out=(y, mask))


def _again(inputs: Inputs, kept: Sequence[Any], spec: Spec) -> Tensor:
    from bnres.kernels.bn_forward import bn_apply

    norms = _norms(inputs, rows_of(kept[0], inputs.x))
    return bn_apply(inputs.x, norms[0], inputs.residual, norms[1], spec.act, spec.act_param)[0]


def _saved(inputs: Inputs, y: Tensor, kept: Sequence[Any], spec: Spec) -> Saved:
    statistics, mask, argmax, x_max = kept
    if spec.pools:
        return Saved(*inputs, statistics, None, argmax, x_max)
    if not _saves_mask(inputs, spec):
        # Without a mask, a custom operator returns an empty tensor instead of None.
        mask = None
    if not spec.reads_x:
        # The next layer usually saves y too, so saving y here takes no additional memory.
        inputs = inputs._replace(x=None if mask is None else y)  # type: ignore[arg-type]
    if mask is not None or (spec.act == "identity" and not spec.has_residual_norm):
        inputs = inputs._replace(residual=None)
    return Saved(*inputs, statistics, mask)


class Asked(NamedTuple):
    """Whether backward must compute dx, dresidual and the sums. `Computed` explains them."""

    dx: bool
    dresidual: bool
    sums: bool


class Computed(NamedTuple):
    """The results of backward. A result that was not computed is None.

    Here dz is the gradient of the activation's input z.

    - ``dx``: the gradient of x.
    - ``dresidual``: the gradient of the residual, which is dz if the residual has no batch norm.
    - ``sum_dy``: Σ dz over each channel.
    - ``sum_dy_xhat``: Σ dz·xhat over each channel, where xhat = (x − mean)·rstd.
    - ``residual_sum_dy`` and ``residual_sum_dy_xhat``: the same sums for the residual's batch norm,
      whose xhat is computed from the residual.
    """

    dx: Maybe
    dresidual: Maybe
    sum_dy: Maybe
    sum_dy_xhat: Maybe
    residual_sum_dy: Maybe = None
    residual_sum_dy_xhat: Maybe = None


def _reduces(spec: Spec, asked: Asked) -> bool:
    """Whether backward needs the reduce pass, which computes the sums and can write dresidual.

    In training, dx depends on the sums.
    """
    if spec.has_residual_norm:
        return spec.training or asked.sums
    return asked.sums or (spec.training and asked.dx) or (asked.dresidual and not asked.dx)


def _allocate_backward(gradients: Gradients, saved: Saved, spec: Spec, asked: Asked) -> Computed:
    x = saved.x
    dx = torch.empty_like(x) if asked.dx else None
    dresidual = torch.empty_like(x) if asked.dresidual else None
    if not _reduces(spec, asked):
        return Computed(dx, dresidual, None, None)
    count = 4 if spec.has_residual_norm else 2
    return Computed(dx, dresidual, *empty_channels(x, count))


def _stored_as(gradients: Gradients, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients in the memory format of ``y``."""
    dy, dy_skip = gradients
    return dense_like(dy, y), None if dy_skip is None else dense_like(dy_skip, y)


def _backward(
    gradients: Gradients, saved: Saved, spec: Spec, asked: Asked, recording: Recording
) -> Computed:
    computed = _allocate_backward(gradients, saved, spec, asked)
    y = saved.x_max if spec.pools else saved.x
    given = _stored_as(gradients, y)
    recording.backward(asked, given).run(_launch_backward, (given, saved, computed), spec)
    return computed


def _launch_backward(gradients: Gradients, saved: Saved, computed: Computed, spec: Spec) -> None:
    """Computes the values of ``computed``.

    The reduce pass computes the sums of dz = (dy + dy_skip)·act'(z). With a max-pool, it reads x
    only at the positions of the maxima, because dz is zero everywhere else. The dx pass computes
    dx.

    The reduce pass also writes dz if dz is the gradient of the residual, or if a max-pool has a
    ``dy_skip``. The dx pass then reads dz instead of dy and dy_skip. If the reduce pass does not
    write the gradient of the residual, the dx pass does.
    """
    from bnres.kernels.bn_backward import bn_backward_dx, bn_backward_reduce
    from bnres.kernels.bn_max_pool import bn_max_pool_backward_dx

    x, residual, mask, act = saved.x, saved.residual, saved.mask, (spec.act, spec.act_param)
    dy, dy_skip = gradients
    dx, dresidual, *sums = computed
    norms = _norms(saved, rows_of(saved.statistics, x))
    if sums[0] is not None:
        dz, reduced = None if spec.has_residual_norm else dresidual, x
        if spec.pools:
            dz, reduced = None if dy_skip is None else torch.empty_like(saved.x_max), saved.x_max
        bn_backward_reduce(
            dy, reduced, norms[0], residual, norms[1], mask, *act, dy_skip=dy_skip,
            out=(Sums(*sums), dz),
        )  # fmt: skip
        if dz is not None:
            dy, dy_skip, residual, mask, dresidual = dz, None, None, None, None
            act = "identity", 0.0
    if dx is None:
        return
    found = Sums(*sums) if spec.training else None
    count = max(x.numel() // max(x.shape[1], 1), 1)
    if spec.pools:
        bn_max_pool_backward_dx(dy, saved.argmax, x, norms[0], *act, found, count, out=dx)
    else:
        bn_backward_dx(
            dy, x, norms[0], residual, norms[1], mask, *act, found, count, dy_skip=dy_skip,
            out=(dx, dresidual),
        )  # fmt: skip


def _input_gradients(
    dy: Tensor,
    dy_skip: Tensor | None,
    saved: Saved,
    spec: Spec,
    needed: Inputs,
    recording: Recording | None,
    run: Callable[..., Computed] | None = None,
) -> Sequence[Tensor | None]:
    if saved.x is None:
        saved = saved._replace(x=dense(dy))
    is_sum = spec.act == "identity" and not (spec.has_residual_norm or spec.pools)
    if spec.has_residual_norm:
        dx = dresidual = bool(needed.x or needed.residual)  # one dx pass writes both
    else:
        dx, dresidual = bool(needed.x), bool(needed.residual) and not is_sum
    sums = needed.weight or needed.bias or needed.residual_weight or needed.residual_bias
    if not spec.training:
        sums = sums or needed.input_bias or needed.residual_input_bias
    asked = Asked(dx, dresidual, bool(sums))
    if dy_skip is not None and (is_sum or (spec.pools and not _reduces(spec, asked))):
        dy, dy_skip = dy + dy_skip, None
    run = run or _run_backward
    found = run(Gradients(dy, dy_skip), saved, spec, asked, recording=recording)
    residual = None
    if needed.residual:
        residual = dy.view_as(dy) if is_sum else found.dresidual
    return (
        found.dx if needed.x else None,
        *_parameter_gradients(0, saved, spec, needed, found),
        residual,
        *_parameter_gradients(1, saved, spec, needed, found),
    )


def _parameter_gradients(
    index: int, saved: Saved, spec: Spec, needed: Inputs, found: Computed
) -> Sequence[Tensor | None]:
    """Returns the gradients of weight, bias and input_bias of one batch norm.

    ``index`` is 0 for the batch norm of x and 1 for the batch norm of the residual.
    """
    its = slice(4 * index + 1, 4 * index + 4)
    needs_weight, needs_bias, needs_input_bias = needed[its]
    if not (needs_weight or needs_bias or needs_input_bias):
        return None, None, None
    weight, bias, input_bias = saved[its]
    sum_dy, sum_dy_xhat = found[2 * index + 2 : 2 * index + 4]
    gradient = None
    if needs_input_bias and spec.training:
        # Subtracting the batch's mean cancels input_bias.
        gradient = torch.zeros_like(input_bias)
    elif needs_input_bias:
        gradient = sum_dy * rows_of(saved.statistics, saved.x)[index].rstd
        gradient = as_dtype_of(input_bias, gradient if weight is None else gradient * weight)
    return (
        as_dtype_of(weight, sum_dy_xhat) if needs_weight else None,
        as_dtype_of(bias, sum_dy) if needs_bias else None,
        gradient,
    )


def _formula(saved: Saved, spec: Spec) -> Tensor:
    x, residual = saved.x, saved.residual
    if spec.training:
        statistics = [bn_stats_ref(x, None, None, 0.0, spec.eps)]
        if spec.has_residual_norm:
            statistics.append(bn_stats_ref(residual, None, None, 0.0, spec.residual_eps))
    else:
        biases = saved.input_bias, saved.residual_input_bias
        statistics = list(map(of_input_bias, rows_of(saved.statistics, x), biases))
    return _formula_of(statistics, saved, spec)


def _formula_of(statistics: Sequence[Statistics], saved: Saved, spec: Spec) -> Tensor:
    x, residual, act = saved.x, saved.residual, (spec.act, spec.act_param)
    norm, residual_norm = _norms(saved, statistics)
    if spec.pools:
        if saved.argmax is None:
            return bn_max_pool_ref(x, norm, *act)[0]
        return bn_max_pool_at_ref(x, norm, *act, saved.argmax)
    if saved.mask is None:
        return bn_apply_ref(x, norm, residual, residual_norm, *act)[0]
    z, _ = bn_apply_ref(x, norm, residual, None, "identity", 0.0)
    return torch.where(unpack_mask(saved.mask, x), z, 0)


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Returns ``mask``, which has one bit per element of ``x``, as booleans in the shape of ``x``.

    The memory format of ``x`` must be contiguous or channels_last.
    """
    from bnres.kernels.bn_backward import bn_backward_dx

    with outside_of_transforms():
        ones = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).fill_(1)
        unit = torch.ones(x.shape[1], dtype=acc_type(x), device=x.device)
        # Without sums, bn_backward_dx returns dy·rstd where the mask is set, and 0 elsewhere. Here
        # dy = 1 and rstd = 1.
        norm = Norm(Statistics(unit, unit))
        passed, _ = bn_backward_dx(
            ones, ones, norm, None, None, unwrapped(mask), "relu", 0.0, None, 1
        )
        return passed != 0


def _check(inputs: Inputs, buffers: Buffers, spec: Spec) -> None:
    x, residual, training = inputs.x, inputs.residual, spec.training
    norm, *others = states_of(inputs, buffers, spec)
    check_batch_norm(x, norm, training)
    if residual is not None:
        check_residual(residual, x.shape, x.device)
    for residual_norm in others:
        check_batch_norm(residual, residual_norm, training, "residual")


def _aten(inputs: Inputs, buffers: Buffers, spec: Spec) -> Tensor:
    residual, training = inputs.residual, spec.training
    norm, *others = states_of(inputs, buffers, spec)
    for residual_norm in others:
        residual = batch_norm_act_aten(residual, residual_norm, training)
    y = batch_norm_act_aten(inputs.x, norm, training, residual, spec.act, spec.act_param)
    return F.max_pool2d(y, 3, stride=2, padding=1) if spec.pools else y


_run_backward = operator(
    "batch_norm_act_backward", _backward, _allocate_backward,
    tensors=(Gradients, Saved), options=(Spec, Asked), outputs=Computed,
)  # fmt: skip

BATCH_NORM_ACT = Operation(
    Inputs=Inputs,
    Saved=Saved,
    writes=WRITTEN,
    check=_check,
    aten=_aten,
    forward=operator(
        "batch_norm_act_forward", _forward, _allocate, tensors=(Inputs, Buffers), options=(Spec,),
        outputs=Outputs, writes=WRITTEN,
    ),
    saved=_saved,
    backward=_input_gradients,
    formula=_formula,
    again=_again,
)  # fmt: skip


def as_call(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    input_bias: Tensor | None,
    residual: Tensor | None,
    residual_norm: BatchNormState | None,
    act: str | type[torch.nn.Module] | None,
    act_kwargs: dict[str, Any] | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    num_batches_tracked: Tensor | None,
    *,
    pools: bool = False,
    group: str = "",
) -> tuple[Inputs, Buffers, Spec]:
    """Returns the arguments of `batch_norm_act` as the inputs, buffers and spec of `call`."""
    name, param = resolve(act, act_kwargs)
    counter = num_batches_tracked if training else None
    device_momentum, number = split_momentum(momentum)
    inputs: Any = (input, weight, bias, input_bias, residual)
    buffers: Any = (running_mean, running_var, counter, device_momentum)
    # The values of has_residual_norm, residual_momentum and residual_eps. `Spec` has no defaults
    # for these, because torch.compile would replace a default number with a symbol.
    of_residual_norm = (False, 0.0, 0.0)
    if residual_norm is not None:
        norm = residual_norm
        if residual is None:
            raise ValueError("residual_norm needs a residual, but residual is None")
        counter = norm.num_batches_tracked if training else None
        device_momentum, residual_number = split_momentum(norm.momentum)
        inputs += (norm.weight, norm.bias, norm.input_bias)
        buffers += (norm.running_mean, norm.running_var, counter, device_momentum)
        of_residual_norm = (True, residual_number, norm.eps)
    # In evaluation the statistics are constants, so only the weight's gradient and the activation's
    # derivative can depend on x. The derivative of identity is 1, and the derivative of relu is
    # stored in the mask.
    depends_on_x = name not in ("identity", "relu") or wants_grad(weight)
    reads_x = training or pools or residual_norm is not None or depends_on_x
    needs_grad = wants_grad(*inputs)
    spec = Spec(
        name, param, training, needs_grad, reads_x, number, eps, *of_residual_norm, pools, group
    )
    return Inputs(*inputs), Buffers(*buffers), spec


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_norm: BatchNormState | None = None,
    act: str | type[torch.nn.Module] | None = "relu",
    act_kwargs: dict[str, Any] | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    fork: bool = False,
) -> Any:
    """Computes ``act(batch_norm(input + input_bias) + residual)`` in one fused operation.

    With ``residual_norm`` the operation computes
    ``act(batch_norm(input + input_bias) + batch_norm(residual))``.

    Args:
        input: (N, C, *) with 2 to 5 dimensions, in fp16, bf16, fp32 or fp64. If it is neither
            contiguous nor channels_last, it is copied into one of these two formats.
        running_mean: (C,) or None, in any floating dtype. Training updates it in place. For CPU
            tensors torch's own batch norm runs, which accepts fewer dtypes.
        running_var: (C,) or None, like ``running_mean``. Training updates it with the unbiased
            variance.
        weight: (C,); None means 1.
        bias: (C,); None means 0.
        input_bias: (C,), added to ``input``; None means 0. For example, ``input`` can be the output
            of a convolution without its bias, and ``input_bias`` the bias. In training
            ``input_bias`` changes only the running mean. It does not change the result, because the
            mean of the batch is subtracted.
        residual: None, or a tensor that is added before the activation. It has the shape of
            ``input``. If the dtypes of ``input`` and ``residual`` differ, the result has the dtype
            of ``input + residual``.
        residual_norm: None, or a batch norm that is applied to ``residual`` before the addition, as
            in a ResNet's down-sampling block. ``training`` applies to both batch norms.
        act: name or torch class of the activation; None means no activation.
        act_kwargs: options of the activation. leaky_relu has ``negative_slope``, and gelu has
            ``approximate``.
        training: whether to normalise with the statistics of the batch instead of the running
            statistics.
        momentum: weight of the batch in the running statistics. It may be a one-element tensor.
            Only the kernels read this tensor, so the host does not wait for the device.
        eps: added to the variance.
        num_batches_tracked: one-element integer tensor or None. Training increments it.
        fork: whether to return the result as two tensors that share memory, one for each of two
            consumers. The backward kernels then add the gradients of the two tensors, so autograd
            needs no separate addition.

    Returns:
        A tensor with the shape and memory format of ``input``. Its dtype is the dtype of ``input``,
        or of ``input + residual`` if there is a residual. With ``fork``, two such tensors.

    Raises:
        ValueError: if ``input`` is not 2-D to 5-D, if ``input`` has only one value per channel in
            training, if the shapes of ``residual`` and ``input`` differ, if there is a
            ``residual_norm`` but no ``residual``, if a ``momentum`` or ``num_batches_tracked``
            tensor does not have exactly one element, or if the activation or an option is unknown.
        TypeError: if a dtype is not supported.
        RuntimeError: if a parameter or a buffer has the wrong size, if tensors are on different
            devices, or if running statistics are missing in evaluation.

    The batch norm is that of `torch.nn.functional.batch_norm` (Ioffe and Szegedy, arXiv
    1502.03167).
    """
    arguments = as_call(
        input, running_mean, running_var, weight, bias, input_bias, residual, residual_norm, act,
        act_kwargs, training, momentum, eps, num_batches_tracked,
    )  # fmt: skip
    return call(BATCH_NORM_ACT, *arguments, fork)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Computes ``(input - mean) / sqrt(var + eps) * weight + bias`` by the fused kernels.

    The signature is that of `torch.nn.functional.batch_norm` (Ioffe and Szegedy, arXiv 1502.03167).
    `batch_norm_act` describes the arguments.
    """
    return batch_norm_act(
        input, running_mean, running_var, weight, bias, act=None, training=training,
        momentum=momentum, eps=eps,
    )  # fmt: skip
