"""One output for two consumers: hands their gradients to the operation that made it, unsummed.

The operation returns its output twice (``fork=True``). `offer` lets the second tensor travel with
the first, and a block that uses its input exactly twice takes both (`take`). Each is a proper
output of the operation, so whoever else uses either gets right values and a right gradient of what
lies before. Only the gradient *of the output itself* comes in two parts, so blocks offer only to a
block that is proved to follow, and nothing is taken from an output that someone watches.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_OFFER = "_bnres_offer"
# An attribute of a block, see `linked`.
LINKED = "_bnres_linked"


def link(blocks: Iterable[nn.Module]) -> None:
    """Tells each block but the last that the next one takes what it offers."""
    *linked, _ = blocks
    for block in linked:
        setattr(block, LINKED, True)


def linked(block: nn.Module) -> bool:
    """Whether the block after this one takes what it offers."""
    return getattr(block, LINKED, False)


def offer(y: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The output of an operation; of two, the first with the second on it for the next block."""
    if isinstance(y, tuple):
        y, y_skip = y
        if y_skip is not y:
            setattr(y, _OFFER, (y_skip, y._version))
    return y


def take(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` for the first consumer and, if one was offered, another tensor for the second."""
    if torch.compiler.is_compiling():
        return x, x
    x_skip, version = x.__dict__.pop(_OFFER, (x, 0))
    if x_skip is x or x._version != version:
        return x, x
    watched = x.requires_grad and (x.retains_grad or x._backward_hooks)
    return (x, x) if watched else (x, x_skip)
