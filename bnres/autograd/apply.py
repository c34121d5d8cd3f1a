"""Applies our autograd Functions at little cost to the host, with forward mode where it can be."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

F = TypeVar("F", bound=type[Function])

_with_forward_mode: dict[type[Function], type[Function]] = {}


def forward_mode_of(function: type[Function]) -> Callable[[F], F]:
    """Declares a class as ``function`` with a jvp, which torch.compile can't capture."""

    def declare(cls: F) -> F:
        _with_forward_mode[function] = cls
        return cls

    return declare


def apply(function: type[Function], *inputs: Any) -> Any:
    """``function.apply(*inputs)`` for inputs in the order of its forward, all of them.

    Outside of torch.compile it is the class declared by `forward_mode_of` that is applied. torch's
    own ``apply`` first binds the inputs to forward's signature, for defaults, which takes ten times
    as long as the call. Where nothing can ask for a derivative it is the forward alone.
    """
    if torch.compiler.is_compiling():
        return function.apply(*inputs)
    function = _with_forward_mode[function]
    if torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    inputs = unwrap_dead_wrappers(inputs)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return super(Function, function).apply(*inputs)  # type: ignore[misc]
    return function.forward(*inputs)
