"""One output for two consumers: hands their gradients to the operation that made it, unsummed.

The operation returns its output twice (``twice=True``). `offer` lets the second tensor travel with
the first, and a block that uses its input exactly twice takes both (`take`). Each is a proper
output of the operation, so whoever else uses either gets right gradients all the same.
"""

import torch
from torch import Tensor

_SKIP = "_bnres_skip"


def offer(y: Tensor, y_skip: Tensor) -> Tensor:
    """``y``, with ``y_skip`` on it for the next block."""
    if y_skip is not y:
        setattr(y, _SKIP, y_skip)
    return y


def take(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` for the first consumer and, if one was offered, another tensor for the second."""
    if torch.compiler.is_compiling():
        return x, x
    return x, x.__dict__.pop(_SKIP, x)
