"""Runs modules in turn so that a residual block's two readers get a tensor each.

A block's output has two readers, the next block's convolution and its shortcut. The operation that
computes the output returns it twice (``fork=True``), so that its backward gets both gradients and
autograd does not add them. No caller, hook or module but the two readers is given one of the two
tensors: its gradient would be only a part of the output's.
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

# Only these very classes: a subclass may do anything with what it is given.
BLOCKS = (BasicBlock, Bottleneck, Residual)
READERS = (nn.Conv2d, BatchNormAct2d, SyncBatchNormAct, nn.Sequential, type(None))
STEMS = (BatchNormAct2d, BatchNormActMaxPool2d, SyncBatchNormAct, SyncBatchNormActMaxPool2d)


class Chain(nn.Sequential):
    """A `torch.nn.Sequential` whose residual blocks get the block before them as two tensors."""

    def forward(self, x: Any) -> Any:
        return run(self, x)


def run(modules: Iterable[nn.Module], x: Any) -> Any:
    """What the modules, called in turn, make of ``x``."""
    # Exported programs and torch.fx's graphs show each module's own call.
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
    """The modules to call: those inside of sequences, without identities."""
    found = []
    for module in modules:
        if type(module) in (nn.Sequential, Chain) and not hooked(module):
            found += _calls(module)
        elif type(module) is not nn.Identity or hooked(module):
            found.append(module)
    return found


def takes_two(module: Any) -> bool:
    """Whether a module is a residual block, with nothing in it that may watch or change its input."""
    if type(module) not in BLOCKS:
        return False
    readers = module.readers()
    return not hooked(module, *readers) and all(type(m) in READERS for m in readers)
