"""Fused calls of batch norm modules, torch's own ones included.

What a module says at the time of the call (its mode, momentum, eps) is what counts.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from bnres.functional import batch_norm_act, batch_norm_act_max_pool2d, dual_batch_norm_act
from bnres.functional.max_pool import Size
from bnres.nn.state import NormState, next_state, normalizes_by_batch

Norm = nn.modules.batchnorm._BatchNorm
Act = str | type[nn.Module] | None


class Pooling(Protocol):
    """What `torch.nn.MaxPool2d` says of its windows."""

    kernel_size: Size
    stride: Size
    padding: Size
    dilation: Size
    ceil_mode: bool


def norm_add_act(
    bn: Norm,
    input: Tensor,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: Act = None,
    act_kwargs: dict[str, Any] | None = None,
    *,
    twice: bool = False,
) -> Any:
    """act(bn(input) + residual), or act(bn(input) + residual_norm(residual)).

    Raises:
        ValueError: for a ``residual_norm`` without a residual.
    """
    options = {"act": act, "act_kwargs": act_kwargs, "twice": twice}
    if residual_norm is None:
        return batch_norm_act(input, residual=residual, **options, **next_state(bn)._asdict())
    if residual is None:
        raise ValueError("residual must be given with residual_norm, got None")
    if normalizes_by_batch(bn) != normalizes_by_batch(residual_norm):
        # One of them is frozen: they need different passes.
        residual = batch_norm_act(residual, act=None, **next_state(residual_norm)._asdict())
        return batch_norm_act(input, residual=residual, **options, **next_state(bn)._asdict())
    state, other = next_state(bn), next_state(residual_norm)
    return dual_batch_norm_act(
        input,
        *_tensors(state),
        residual,
        *_tensors(other),
        training=state.training,
        momentum=state.momentum,
        eps=state.eps,
        residual_momentum=other.momentum,
        residual_eps=other.eps,
        **options,
    )


def _tensors(state: NormState) -> tuple[Tensor | None, ...]:
    return state.running_mean, state.running_var, state.weight, state.bias


def norm_act_pool(
    bn: Norm,
    input: Tensor,
    pool: Pooling,
    act: Act = None,
    act_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """max_pool2d(act(bn(input))) with the windows of ``pool``."""
    return batch_norm_act_max_pool2d(
        input,
        kernel_size=pool.kernel_size,
        stride=pool.stride,
        padding=pool.padding,
        dilation=pool.dilation,
        ceil_mode=pool.ceil_mode,
        act=act,
        act_kwargs=act_kwargs,
        **next_state(bn)._asdict(),
    )
