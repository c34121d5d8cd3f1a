"""The calls that a rewritten forward makes.

They read every module as it is at the time of the call. Where it is no longer what was proved (a
hook, another class, another device of a pooling), they call the modules one after another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bnres.activations import CLASSES, resolve
from bnres.functional import conv2d_act
from bnres.kernels.reference import ACTIVATION_FORMULAS
from bnres.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnres.nn.compose import (
    conv_norm_act_pool,
    conv_norm_add_act,
    norm_act_pool,
    norm_add_act,
)
from bnres.nn.handout import offer, take
from bnres.nn.hooks import hooked

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
)
# Modules called one after another, the last of them a batch norm (or, folded, an Identity).
Branch = Sequence[nn.Module] | nn.Sequential
# A module, or the name of an activation and its options.
Act = nn.Module | tuple[str, dict[str, Any]] | None
# A module, or the arguments of max_pool2d.
Pool = nn.MaxPool2d | tuple[Any, ...] | None


class Windows:
    """The arguments of a call of max_pool2d, under the names of `torch.nn.MaxPool2d`."""

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> None:
        self.kernel_size, self.padding, self.dilation = kernel_size, padding, dilation
        self.stride = kernel_size if stride is None else stride
        self.ceil_mode = ceil_mode


def activation(act: Act) -> tuple[str, dict[str, Any]]:
    """Name and options of an activation."""
    if act is None:
        return "identity", {}
    if isinstance(act, tuple):
        return act
    if isinstance(act, nn.LeakyReLU):
        return "leaky_relu", {"negative_slope": act.negative_slope}
    if isinstance(act, nn.GELU):
        return "gelu", {"approximate": act.approximate}
    return CLASSES[type(act)], {}


def split(branch: Branch) -> tuple[list[nn.Module], nn.Conv2d | None, Any]:
    """What comes first, the convolution in front of the batch norm if there is one, and that."""
    *first, last = branch
    if first and type(first[-1]) is nn.Conv2d:
        return first[:-1], first[-1], last
    return first, None, last


def run_branch(branch: Branch, x: Tensor) -> Tensor:
    """The modules one after another."""
    if isinstance(branch, nn.Sequential):
        return branch(x)
    for module in branch:
        x = module(x)
    return x


def _fusable(branch: Branch | None) -> bool:
    """Whether a branch still ends in a batch norm that no hook waits for."""
    if branch is None:
        return True
    _, conv, norm = split(branch)
    outer = branch if isinstance(branch, nn.Sequential) else None
    return type(norm) in NORMS and not hooked(conv, norm, outer)


def _folded(branch: Branch | None) -> bool:
    """Whether the batch norm of a branch was folded into its convolution."""
    return branch is not None and isinstance(split(branch)[2], nn.Identity)


def norm(
    branch: Branch,
    x: Tensor,
    act: Act = None,
    residual: Tensor | None = None,
    residual_branch: Branch | None = None,
    offers: bool = False,
) -> Tensor:
    """act(branch(x) + residual_branch(residual)), the ends of the branches being batch norms."""
    act_module = act if isinstance(act, nn.Module) else None
    if hooked(act_module) or not (_fusable(branch) and _fusable(residual_branch)):
        return _unfused(branch, x, act, residual, residual_branch)
    first, conv, bn = split(branch)
    name, options = activation(act)
    x = run_branch(first, x)
    residual_conv, residual_norm = None, None
    if residual_branch is not None and residual is not None:
        first, residual_conv, residual_norm = split(residual_branch)
        residual = run_branch(first, residual)
    common: dict[str, Any] = {"act": name, "act_kwargs": options, "twice": offers}
    if conv is not None:
        y = conv_norm_add_act(conv, bn, x, residual, residual_conv, residual_norm, **common)
    else:
        if residual_conv is not None and residual is not None:
            residual = residual_conv(residual)
        y = norm_add_act(bn, x, residual, residual_norm, **common)
    return offer(*y) if offers else y


def norm_pool(branch: Branch, x: Tensor, act: Act, pool: Pool) -> Tensor:
    """max_pool2d(act(branch(x)))."""
    windows = Windows(*pool) if isinstance(pool, tuple) else pool
    modules = [m for m in (act, pool) if isinstance(m, nn.Module)]
    if hooked(*modules) or not _fusable(branch) or windows is None:
        y = _unfused(branch, x, act, None, None)
        if isinstance(pool, nn.Module):
            return pool(y)
        return F.max_pool2d(y, *(pool or ()))
    first, conv, bn = split(branch)
    name, options = activation(act)
    x = run_branch(first, x)
    if conv is not None:
        return conv_norm_act_pool(conv, bn, x, windows, name, options)
    return norm_act_pool(bn, x, windows, name, options)


def _unfused(
    branch: Branch, x: Tensor, act: Act, residual: Tensor | None, residual_branch: Branch | None
) -> Tensor:
    """The same out of the modules' own calls, or of folded convolutions."""
    if residual is not None and residual_branch is not None:
        residual = run_branch(residual_branch, residual)
    act_module = act if isinstance(act, nn.Module) else None
    _, conv, _ = split(branch)
    outer = branch if isinstance(branch, nn.Sequential) else None
    if _folded(branch) and conv is not None and not hooked(conv, act_module, outer):
        return _folded_call(branch, x, act, residual)
    y = run_branch(branch, x)
    if residual is not None:
        y = y + residual
    if act_module is not None:
        return act_module(y)
    name, options = activation(act)
    return ACTIVATION_FORMULAS[name](y, resolve(name, options)[1])


def _folded_call(branch: Branch, x: Tensor, act: Act, residual: Tensor | None) -> Tensor:
    """act(conv(x) + residual) with a convolution that took a batch norm in."""
    first, conv, _ = split(branch)
    assert conv is not None
    name, options = activation(act)
    x = run_branch(first, x)
    if conv.padding_mode != "zeros":
        y = conv(x) if residual is None else conv(x) + residual
        return ACTIVATION_FORMULAS[name](y, resolve(name, options)[1])
    return conv2d_act(
        x, conv.weight, conv.bias, stride=conv.stride, padding=conv.padding,
        dilation=conv.dilation, groups=conv.groups, residual=residual, act=name,
        act_kwargs=options,
    )  # fmt: skip


CALLS: tuple[Callable[..., Any], ...] = (norm, norm_pool, take)
