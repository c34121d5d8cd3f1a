"""Applies our autograd Functions at little cost to the host."""

from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad


def apply(function: type[Function], *inputs: Any) -> Any:
    """``function.apply(*inputs)`` for inputs in the order of its forward, all of them.

    torch's own ``apply`` first binds them to forward's signature, for defaults, which takes ten
    times as long as the call. Where nothing can ask for a derivative it is the forward alone.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return super(Function, function).apply(*unwrap_dead_wrappers(inputs))  # type: ignore[misc]
    return function.forward(*unwrap_dead_wrappers(inputs))
