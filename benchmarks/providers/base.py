"""Defines what a provider has to implement.

A provider is an implementation of the operations that is compared with other providers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import OpCase
from benchmarks.operations import Inputs

Results = Sequence[Tensor]


class Unavailable(Exception):
    """Raised if a provider is not installed, or does not support this machine or this case."""


@dataclass(frozen=True)
class Implementation:
    """An operation bound to its inputs.

    Attributes:
        forward: returns the outputs. In training it also updates the running statistics in the
            inputs.
        backward: returns the gradients of `Inputs.leaves`, in the same order.
        note: backend or library that computes the operation.
    """

    forward: Callable[[], Results]
    backward: Callable[[], Results]
    note: str = ""


Bind = Callable[[Inputs], Implementation]


@dataclass(frozen=True)
class Provider:
    """A library's or a backend's implementation of the operations.

    Attributes:
        name: name in the results.
        prepare: prepares a case. Returns a function that takes inputs and returns the case's
            `Implementation`. ``prepare`` and the function may raise `Unavailable`.
        dtype: dtype that replaces bf16 if the provider does not support bf16, otherwise None.
    """

    name: str
    prepare: Callable[[OpCase], Bind]
    dtype: str | None = None

    def dtype_of(self, case: OpCase) -> str:
        """Returns the dtype in which this provider runs a case."""
        return self.dtype if self.dtype is not None and case.dtype == "bf16" else case.dtype


def by_autograd(
    function: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs, note: str = ""
) -> Implementation:
    """Implements an operation by a function that autograd differentiates.

    The first call of ``backward`` also runs a forward. Later calls use the same autograd graph.
    """
    outputs: list[tuple[Tensor, ...]] = []

    def backward() -> Results:
        if not outputs:
            outputs.append(function(inputs))
        return torch.autograd.grad(outputs[0], inputs.leaves, inputs.gradients, retain_graph=True)

    return Implementation(lambda: function(inputs), backward, note)
