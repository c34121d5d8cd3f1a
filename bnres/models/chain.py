"""Calls modules one after another, and passes each block's output to the next block as two tensors.

A block's output is read twice, by the convolution and by the shortcut of the next block. With
``fork=True``, the operation that computes the output returns it as two tensors, one for each
reader. The operation's backward then gets both gradients and adds them, which saves autograd a
pass.

No other code may get one of the two tensors. The gradient of each tensor is only a part of the
output's gradient, so a caller, a hook or another module would see a wrong gradient.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from bnres.kernels.torch_internals import is_exporting
from bnres.models.blocks import BasicBlock, Bottleneck, Residual
from bnres.nn import (
    BatchNormAct2d,
    BatchNormActMaxPool2d,
    SyncBatchNormAct,
    SyncBatchNormActMaxPool2d,
)
from bnres.nn.hooks import hooked

# Subclasses of these classes are not accepted, because they may use their input in other ways.
BLOCKS = (BasicBlock, Bottleneck, Residual)
READERS = (nn.Conv2d, BatchNormAct2d, SyncBatchNormAct, nn.Sequential, type(None))
STEMS = (BatchNormAct2d, BatchNormActMaxPool2d, SyncBatchNormAct, SyncBatchNormActMaxPool2d)


class Chain(nn.Sequential):
    """A `torch.nn.Sequential` that passes each block's output to the next block as two tensors."""

    def forward(self, x: Any) -> Any:
        return run(self, x)


def run(modules: Iterable[nn.Module], x: Any) -> Any:
    """Calls the modules one after another, starting with ``x``, and returns the last output."""
    # torch.export and torch.fx trace plain calls of the modules. Under torch.fx, x is a proxy.
    if is_exporting() or not isinstance(x, Tensor):
        for module in modules:
            x = module(x)
        return x
    calls = _calls(modules)
    takes = [takes_two(module) for module in calls]
    skip = x
    for module, given_two, fork in zip(calls, takes, [*takes[1:], False], strict=True):
        if given_two:
            y = module(x, skip, fork=fork)
        elif fork and type(module) in STEMS and not hooked(module):
            y = module(x, fork=True)
        else:
            y, fork = module(x), False
        x, skip = y if fork else (y, y)
    return x


def _calls(modules: Iterable[Any]) -> list[nn.Module]:
    """Returns the modules to call, in order.

    A sequence without hooks is replaced by its modules. An identity without hooks is left out.
    """
    found = []
    for module in modules:
        if type(module) in (nn.Sequential, Chain) and not hooked(module):
            found += _calls(module)
        elif type(module) is not nn.Identity or hooked(module):
            found.append(module)
    return found


def takes_two(module: Any) -> bool:
    """Whether a module is a residual block that can take its input as two tensors.

    The answer is no if a hook or a module of an unknown class may read the input.
    """
    if type(module) not in BLOCKS:
        return False
    readers = module.readers()
    return not hooked(module, *readers) and all(type(m) in READERS for m in readers)
