"""The calls that a rewritten forward makes.

They read every module as it is at the time of the call. Where it is no longer what was proved (a
hook, another class), they call the modules one after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bnres.activations import CLASSES, resolve
from bnres.kernels.reference import ACTIVATION_FORMULAS
from bnres.kernels.window import Window
from bnres.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnres.nn.compose import conv_norm_add_act, norm_act_pool
from bnres.nn.handout import offer
from bnres.nn.hooks import hooked

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
NORMS = (*SWAPS, *SWAPS.values())
# Modules called one after another, the last of them a batch norm.
Branch = Sequence[nn.Module] | nn.Sequential
# A module, or the name of an activation and its options.
Act = nn.Module | tuple[str, dict[str, Any]] | None
# A module, or the arguments of max_pool2d.
Pool = nn.MaxPool2d | tuple[Any, ...] | None


@dataclass
class Windows:
    """The arguments of a call of max_pool2d, under the names of `torch.nn.MaxPool2d`."""

    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False


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


def _plain(act: Act) -> bool:
    """Whether an activation is still one that can be fused."""
    return not isinstance(act, nn.Module) or (type(act) in CLASSES and not hooked(act))


def _plain_pool(pool: Pool) -> bool:
    """Whether a pooling is still one that can be fused."""
    if not isinstance(pool, nn.Module):
        return True
    return type(pool) is nn.MaxPool2d and not pool.return_indices and not hooked(pool)


def _output_shape(conv: nn.Conv2d | None, x: Tensor) -> tuple[int, ...]:
    """The shape of conv(x), or of x."""
    if conv is None or x.dim() != 4:
        return tuple(x.shape)
    if conv.padding == "same":
        return (x.shape[0], conv.out_channels, *x.shape[2:])
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
    window = Window(*conv.kernel_size, *conv.stride, *padding, *conv.dilation)  # type: ignore[call-arg]
    return (x.shape[0], conv.out_channels, *window.output_size(*x.shape[2:]))


def norm(
    branch: Branch,
    x: Tensor,
    act: Act = None,
    residual: Tensor | None = None,
    residual_branch: Branch | None = None,
    offers: bool = False,
) -> Tensor:
    """act(branch(x) + residual_branch(residual)), the ends of the branches being batch norms."""
    if not (_plain(act) and _fusable(branch) and _fusable(residual_branch)):
        return _unfused(branch, x, act, residual, residual_branch)
    first, conv, bn = split(branch)
    name, options = activation(act)
    x = run_branch(first, x)
    residual_conv, residual_norm = None, None
    if residual_branch is not None and residual is not None:
        first, residual_conv, residual_norm = split(residual_branch)
        residual = run_branch(first, residual)
    if residual is not None and _output_shape(conv, x) != _output_shape(residual_conv, residual):
        # The addition broadcasts.
        ends = [tuple(m for m in end if m is not None) for end in
                ((conv, bn), (residual_conv, residual_norm))]  # fmt: skip
        return _unfused(ends[0], x, act, residual, ends[1] or None)
    y = conv_norm_add_act(
        conv, bn, x, residual, residual_conv, residual_norm, name, options, fork=offers
    )
    return offer(y)


def norm_pool(branch: Branch, x: Tensor, act: Act, pool: Pool) -> Tensor:
    """max_pool2d(act(branch(x)))."""
    windows = Windows(*pool) if isinstance(pool, tuple) else pool
    if not (_plain(act) and _plain_pool(pool) and _fusable(branch)) or windows is None:
        y = _unfused(branch, x, act, None, None)
        if isinstance(pool, nn.Module):
            return pool(y)
        return F.max_pool2d(y, *(pool or ()))
    first, conv, bn = split(branch)
    name, options = activation(act)
    x = run_branch(first, x)
    return norm_act_pool(bn, x, windows, name, options, conv)


def _unfused(
    branch: Branch, x: Tensor, act: Act, residual: Tensor | None, residual_branch: Branch | None
) -> Tensor:
    """The same by the modules' own calls."""
    if residual is not None and residual_branch is not None:
        residual = run_branch(residual_branch, residual)
    act_module = act if isinstance(act, nn.Module) else None
    y = run_branch(branch, x)
    if residual is not None:
        y = y + residual
    if act_module is not None:
        return act_module(y)
    name, options = activation(act)
    return ACTIVATION_FORMULAS[name](y, resolve(name, options)[1])
