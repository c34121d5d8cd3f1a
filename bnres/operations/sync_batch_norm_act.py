"""Computes act(batch_norm(x) + residual) with the statistics of all ranks of a process group.

A rank is a process of the group. In forward each rank computes three moments of its x for each
channel: the count, the mean and M2 = Σ(x − mean)². After an all_gather of the moments, each rank
computes the statistics and y. In backward each rank computes the sums on which dx depends. After an
all_gather of the sums, each rank computes dx.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from bnres.kernels.dtypes import acc_type
from bnres.kernels.norm import Statistics, Sums
from bnres.kernels.outputs import empty_moments
from bnres.kernels.reference import bn_combine_ref, bn_moments_ref
from bnres.kernels.torch_internals import all_gather, process_group_named, reduce_scatter
from bnres.operations.arguments import as_kernels_take, check_input, check_norm, check_residual
from bnres.operations.batch_norm_act import (
    BATCH_NORM_ACT,
    WRITTEN,
    Asked,
    Buffers,
    Computed,
    Inputs,
    Saved,
    Spec,
    _again,
    _formula_of,
    _input_gradients,
    _launch_backward,
    _norms,
    _reduces,
    _stored_as,
    as_call,
    batch_norm_act,
)
from bnres.operations.batch_norm_act import _allocate as _allocate_locally
from bnres.operations.batch_norm_act import _saved as _saved_locally
from bnres.operations.call import Operation, call
from bnres.operations.norms import BatchNormState, rows_of, states_of
from bnres.operations.operator import Gradients, Maybe, Recording, operator


class Normalised(NamedTuple):
    """The tensors that are normalised: x, and the residual if the residual has a batch norm."""

    x: Tensor
    residual: Maybe


class Moments(NamedTuple):
    """Count, mean and M2 = Σ(x − mean)² of each channel, for each batch norm.

    ``moments`` is (3·norms, C) on one rank, and (ranks, 3·norms, C) after the all_gather.
    """

    moments: Tensor


class Outputs(NamedTuple):
    """y, and the tensors that backward reads. ``total`` (1,) is the sum of all ranks' counts."""

    y: Tensor
    statistics: Maybe
    mask: Maybe
    total: Maybe


def _normalised(inputs: Inputs | Saved, spec: Spec) -> Normalised:
    return Normalised(inputs.x, inputs.residual if spec.has_residual_norm else None)


def _allocate_moments(given: Normalised) -> Moments:
    return Moments(empty_moments(given.x, 1 if given.residual is None else 2))


def _moments(given: Normalised, recording: Recording) -> Moments:
    found = _allocate_moments(given)
    recording.forward.run(_launch_moments, (given, found))
    return found


def _launch_moments(given: Normalised, found: Moments) -> None:
    from bnres.kernels.bn_forward import bn_moments

    for i, t in enumerate(given):
        if t is not None:
            bn_moments(t, out=found.moments[3 * i : 3 * i + 3])


def _allocate(inputs: Inputs, buffers: Buffers, gathered: Moments, spec: Spec) -> Outputs:
    y, statistics, mask, *_ = _allocate_locally(inputs, buffers, spec)
    total = inputs.x.new_empty(1, dtype=torch.float64) if spec.needs_grad else None
    return Outputs(y, statistics, mask, total)


def _apply(
    inputs: Inputs, buffers: Buffers, gathered: Moments, spec: Spec, recording: Recording
) -> Outputs:
    outputs = _allocate(inputs, buffers, gathered, spec)
    recording.forward.run(_launch_apply, (inputs, buffers, gathered, outputs), spec)
    return outputs


def _launch_apply(
    inputs: Inputs, buffers: Buffers, gathered: Moments, outputs: Outputs, spec: Spec
) -> None:
    """Computes the values of ``outputs``."""
    from bnres.kernels.bn_forward import bn_apply, bn_combine

    y, kept, mask, total = outputs
    rows: Any = None if kept is None else rows_of(kept, inputs.x)
    statistics = []
    for i, state in enumerate(states_of(inputs, buffers, spec)):
        found, _ = bn_combine(
            gathered.moments[:, 3 * i : 3 * i + 3], state.running_mean, state.running_var,
            state.momentum, state.eps, counter=state.num_batches_tracked,
            out=None if rows is None else (rows[i], total),
        )  # fmt: skip
        statistics.append(found)
    norms = _norms(inputs, statistics)
    bn_apply(inputs.x, norms[0], inputs.residual, norms[1], spec.act, spec.act_param, out=(y, mask))


def _forward(inputs: Inputs, buffers: Buffers, spec: Spec, recording: Recording | None) -> Outputs:
    (moments,) = _run_moments(_normalised(inputs, spec), recording=None)
    gathered = Moments(all_gather(moments, spec.group))
    return _run_apply(inputs, buffers, gathered, spec, recording=None)  # type: ignore[no-any-return]


def _saved(inputs: Inputs, y: Tensor, kept: Sequence[Any], spec: Spec) -> Saved:
    statistics, mask, total = kept
    return _saved_locally(inputs, y, (statistics, mask, None, None), spec)._replace(total=total)


class Reduced(NamedTuple):
    """The sums of this rank, and dz or None.

    ``sums`` has a row for each field of `Sums`: (4, C) if the residual has a batch norm, otherwise
    (2, C). ``dz`` is the gradient of the activation's input, if `_writes_dz` is True.
    """

    sums: Tensor
    dz: Maybe


class Totals(NamedTuple):
    """The ``sums`` of `Reduced`, added over all ranks and divided by the total of the counts."""

    sums: Tensor


class InputGradients(NamedTuple):
    """The gradient of x and, if the residual has a batch norm, the gradient of the residual."""

    dx: Tensor
    dresidual: Maybe


def _writes_dz(spec: Spec, asked: Asked) -> bool:
    """Whether the reduce pass writes dz, the gradient of a residual that has no batch norm."""
    return asked.dresidual and not spec.has_residual_norm


def _allocate_reduced(gradients: Gradients, saved: Saved, spec: Spec, asked: Asked) -> Reduced:
    x, rows = saved.x, 4 if spec.has_residual_norm else 2
    dz = torch.empty_like(x) if _writes_dz(spec, asked) else None
    return Reduced(x.new_empty(rows, x.shape[1], dtype=acc_type(x)), dz)


def _reduce(
    gradients: Gradients, saved: Saved, spec: Spec, asked: Asked, recording: Recording
) -> Reduced:
    found = _allocate_reduced(gradients, saved, spec, asked)
    given = _stored_as(gradients, saved.x)
    recording.forward.run(_launch_reduce, (given, saved, found), spec)
    return found


def _launch_reduce(gradients: Gradients, saved: Saved, found: Reduced, spec: Spec) -> None:
    _launch_backward(gradients, saved, Computed(None, found.dz, *found.sums.unbind()), spec)


def _allocate_dx(gradients: Gradients, saved: Saved, totals: Totals, spec: Spec) -> InputGradients:
    dresidual = torch.empty_like(saved.x) if spec.has_residual_norm else None
    return InputGradients(torch.empty_like(saved.x), dresidual)


def _dx(
    gradients: Gradients, saved: Saved, totals: Totals, spec: Spec, recording: Recording
) -> InputGradients:
    found = _allocate_dx(gradients, saved, totals, spec)
    given = _stored_as(gradients, saved.x)
    recording.forward.run(_launch_dx, (given, saved, totals, found), spec)
    return found


def _launch_dx(
    gradients: Gradients, saved: Saved, totals: Totals, found: InputGradients, spec: Spec
) -> None:
    from bnres.kernels.bn_backward import bn_backward_dx

    dy, dy_skip = gradients
    norms = _norms(saved, rows_of(saved.statistics, saved.x))
    # bn_backward_dx divides the sums by a count. The count is 1 here, because the sums have already
    # been divided by the total of the counts. Passing this total as a number would make the host
    # wait for the device.
    bn_backward_dx(
        dy, saved.x, norms[0], saved.residual, norms[1], saved.mask, spec.act, spec.act_param,
        Sums(*totals.sums.unbind()), 1, dy_skip=dy_skip, out=tuple(found),
    )  # fmt: skip


def _backward(
    gradients: Gradients, saved: Saved, spec: Spec, asked: Asked, recording: Recording | None
) -> Computed:
    """Returns dx and dresidual, computed with the sums of all ranks, and the sums of this rank.

    The sums of this rank are the gradients of the parameters for this rank's batch.
    """
    if not _reduces(spec, asked):
        return Computed(None, None, None, None)
    sums, dz = _run_reduce(gradients, saved, spec, asked, recording=None)
    dx, dresidual = None, dz if _writes_dz(spec, asked) else None
    if asked.dx:
        totals = Totals(all_gather(sums, spec.group).sum(0, dtype=torch.float64) / saved.total)
        if dresidual is not None:
            # dz already contains dy_skip and act'(z), so neither may be applied again.
            gradients, spec = Gradients(dz, None), spec._replace(act="identity", act_param=0.0)
            saved = saved._replace(residual=None, mask=None)
        dx, of_norm = _run_dx(gradients, saved, totals, spec, recording=None)
        dresidual = of_norm if spec.has_residual_norm else dresidual
    return Computed(dx, dresidual, *sums.unbind())


class _Exchange(Function):
    """Calls `all_gather` or `reduce_scatter`. Backward calls the other of the two."""

    @staticmethod
    def forward(t, group, gathers):
        return all_gather(t, group) if gathers else reduce_scatter(t, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, ctx.gathers = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(grad, ctx.group, not ctx.gathers), None, None


def _statistics(
    inputs: Inputs | Saved, states: Sequence[BatchNormState], spec: Spec
) -> list[Statistics]:
    """Returns the statistics of each batch norm by torch's operations, and updates the buffers."""
    given = [t for t in _normalised(inputs, spec) if t is not None]
    moments = torch.cat([bn_moments_ref(t) for t in given])
    gathered = _Exchange.apply(moments, spec.group, True)
    return [
        bn_combine_ref(
            gathered[:, 3 * i : 3 * i + 3], state.running_mean, state.running_var, state.momentum,
            state.eps, counter=state.num_batches_tracked,
        )[0]
        for i, state in enumerate(states)
    ]  # fmt: skip


def _formula(saved: Any, spec: Spec) -> Tensor:
    states = states_of(saved, Buffers(*[None] * len(Buffers._fields)), spec)
    return _formula_of(_statistics(saved, states, spec), saved, spec)


def _aten(inputs: Inputs, buffers: Buffers, spec: Spec) -> Tensor:
    inputs = as_kernels_take(inputs)
    statistics = _statistics(inputs, states_of(inputs, buffers, spec), spec)
    return _formula_of(statistics, Saved(*inputs, None), spec)


def _check(inputs: Inputs, buffers: Buffers, spec: Spec) -> None:
    x, residual = inputs.x, inputs.residual
    # With training=False the check accepts one value per channel, because other ranks may have
    # more.
    check_input(x, training=False)
    if x.shape[1] == 0:
        raise ValueError(f"input must have channels, got input size {x.size()}")
    if residual is not None:
        check_residual(residual, x.shape, x.device)
    for state, prefix in zip(states_of(inputs, buffers, spec), ("", "residual_"), strict=False):
        check_norm(state, x.shape[1], x.device, True, prefix)
        if state.input_bias is not None:
            raise ValueError(
                f"{prefix}input_bias must be None: synchronised batch norm does not support it"
            )


_run_moments = operator(
    "sync_batch_norm_moments", _moments, _allocate_moments,
    tensors=(Normalised,), options=(), outputs=Moments,
)  # fmt: skip
_run_apply = operator(
    "sync_batch_norm_act_forward", _apply, _allocate,
    tensors=(Inputs, Buffers, Moments), options=(Spec,), outputs=Outputs, writes=WRITTEN,
)  # fmt: skip
_run_reduce = operator(
    "sync_batch_norm_act_reduce", _reduce, _allocate_reduced,
    tensors=(Gradients, Saved), options=(Spec, Asked), outputs=Reduced,
)  # fmt: skip
_run_dx = operator(
    "sync_batch_norm_act_backward", _dx, _allocate_dx,
    tensors=(Gradients, Saved, Totals), options=(Spec,), outputs=InputGradients,
)  # fmt: skip

SYNC_BATCH_NORM_ACT = Operation(
    Inputs=Inputs,
    Saved=Saved,
    writes=WRITTEN,
    check=_check,
    aten=_aten,
    forward=_forward,
    saved=_saved,
    backward=partial(_input_gradients, run=_backward),
    formula=_formula,
    again=_again,
)


def group_named(process_group: Any = None) -> Any:
    """Returns the process group that ``process_group`` is or names.

    None stands for torch.distributed's default group of all ranks.
    """
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "process_group: there is no default group, "
                "call torch.distributed.init_process_group first"
            )
        return dist.group.WORLD
    if isinstance(process_group, str):
        return process_group_named(process_group)
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this process is in, "
            f"got {process_group!r}"
        )
    return process_group


def _check_ranks(mine: tuple[int, str, bool], group: Any) -> None:
    """Raises an error unless ``mine`` is the same on all ranks.

    ``mine`` is the number of channels, the name of the dtype of the statistics, and whether there
    is a ``residual_norm``.
    """
    ranks = dist.get_process_group_ranks(group)
    every: list[Any] = [None] * len(ranks)
    dist.all_gather_object(every, mine, group)
    texts = ["{} channels, statistics in {}, residual_norm {}".format(*each) for each in every]
    for rank, text in zip(ranks, texts, strict=True):
        if text != texts[0]:
            raise ValueError(
                f"input and residual_norm must match on all ranks, but rank {rank} has {text}; "
                f"rank {ranks[0]} has {texts[0]}"
            )


def sync_batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    residual_norm: BatchNormState | None = None,
    act: str | type[torch.nn.Module] | None = "relu",
    act_kwargs: dict[str, Any] | None = None,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    fork: bool = False,
    process_group: Any = None,
) -> Any:
    """Computes ``act(batch_norm(input) + residual)`` with the statistics of all ranks' batches.

    A rank is a process of ``process_group``. The operation does what `batch_norm_act` does in
    training, but with the mean and variance of the batches of all ranks. On rank r a channel has
    n_r values with the mean mean_r, and M2_r = Σ (x − mean_r)². The statistics of the channel are:

    - N = Σ n_r
    - mean = Σ n_r·mean_r / N
    - var = Σ (M2_r + n_r·(mean_r − mean)²) / N

    These sums over r are computed in fp64 and in a fixed order, so the statistics have the same
    bits on all ranks and in every run.

    Forward makes one all_gather, of 3·C values for each batch norm. Backward makes one all_gather,
    of 2·C values for each batch norm. With ``residual_norm`` there are two batch norms. The host
    never waits for the device. If the group has only one rank, `batch_norm_act` runs.

    Every rank of the group must call the operation and its backward. All ranks must have the same
    number of channels and the same dtype, and either all or none must have a ``residual_norm``.
    Otherwise gloo and NCCL may abort or hang. If the environment variable
    ``TORCH_DISTRIBUTED_DEBUG`` is ``DETAIL``, each call first checks that the ranks match, and the
    host waits for the device.

    The ranks' batches may have different sizes and may be empty. The gradients on a rank with an
    empty batch are zero. If all batches are empty, the running statistics do not change.

    Each rank computes the parameters' gradients from its own batch. DistributedDataParallel
    averages these gradients. The arguments not listed here are those of `batch_norm_act`.

    Args:
        process_group: the process group of the participating ranks, or the name of this group. By
            default all ranks participate.

    Returns:
        The same as `batch_norm_act`.

    Raises:
        RuntimeError: if ``process_group`` is None and there is no default group, or if
            `batch_norm_act` raises it.
        TypeError: if ``process_group`` is not a process group that this process belongs to, or if
            `batch_norm_act` raises it.
        ValueError: if a CPU tensor is used with an NCCL group, if ``input`` has no channels, if
            ``residual_norm`` has an ``input_bias``, if ``TORCH_DISTRIBUTED_DEBUG`` is ``DETAIL``
            and the ranks do not match, or if `batch_norm_act` raises it. If there are several
            ranks, an ``input`` with one value per channel raises no error.

    The batch norm is that of `torch.nn.SyncBatchNorm` (Ioffe and Szegedy, arXiv 1502.03167). The
    variance is combined by the method of Chan, Golub and LeVeque (1979).
    """
    group = group_named(process_group)
    is_alone = dist.get_world_size(group) == 1
    arguments = as_call(
        input, running_mean, running_var, weight, bias, None, residual, residual_norm, act,
        act_kwargs, True, momentum, eps, num_batches_tracked,
        group="" if is_alone else group.group_name,
    )  # fmt: skip
    if is_alone:
        return call(BATCH_NORM_ACT, *arguments, fork)
    if input.device.type == "cpu" and dist.get_backend(group) == "nccl":
        raise ValueError(
            "process_group has the backend nccl, which does not support CPU tensors, "
            "got an input on the CPU"
        )
    if not is_compiling() and dist.get_debug_level() == dist.DebugLevel.DETAIL:
        _check_ranks((input.shape[1], str(acc_type(input)), residual_norm is not None), group)
    return call(SYNC_BATCH_NORM_ACT, *arguments, fork)


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    num_batches_tracked: Tensor | None,
    group: str,
) -> Tensor:
    """Returns the batch norm of ``input``, synchronised over the process group named ``group``.

    If ``group`` is an empty string, the batch norm is not synchronised. `bnres.fuse` finds
    synchronised batch norms in a captured graph by the calls of this function.
    """
    function: Any = batch_norm_act
    options: dict[str, Any] = {"training": training}
    if group:
        function, options = sync_batch_norm_act, {"process_group": group}
    return function(  # type: ignore[no-any-return]
        input, running_mean, running_var, weight, bias, act=None, momentum=momentum, eps=eps,
        num_batches_tracked=num_batches_tracked, **options,
    )  # fmt: skip
