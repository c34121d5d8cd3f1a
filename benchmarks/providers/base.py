"""What a provider of an operation is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import OpCase
from benchmarks.operations import Inputs

Results = Sequence[Tensor]


class Unavailable(Exception):
    """A provider that this machine, or this case, does not have; says why."""


@dataclass(frozen=True)
class Implementation:
    """An operation bound to its inputs.

    Attributes:
        forward: the outputs; in training it updates the running statistics of the inputs.
        backward: gradients in the order of `Inputs.leaves`.
        note: what torch chose behind it, for the record.
    """

    forward: Callable[[], Results]
    backward: Callable[[], Results]
    note: str = ""


Bind = Callable[[Inputs], Implementation]


@dataclass(frozen=True)
class Provider:
    """Somebody's implementation of the operations.

    Attributes:
        name: as results have it.
        prepare: compiles what a case needs, once, and returns what binds it to inputs; raises
            `Unavailable`.
        dtype: what it takes in place of bf16, or None.
    """

    name: str
    prepare: Callable[[OpCase], Bind]
    dtype: str | None = None

    def dtype_of(self, case: OpCase) -> str:
        """The dtype that this provider is timed in."""
        return self.dtype if self.dtype is not None and case.dtype == "bf16" else case.dtype


TRAINING_NORMS = ("bn", "bn_relu", "bn_add_relu")


def needs_training_norm(case: OpCase) -> None:
    """Raises `Unavailable` for what is no batch norm in training, perhaps with addition and ReLU."""
    if case.site.operation not in TRAINING_NORMS or case.direction == "eval":
        raise Unavailable(f"has no fused {case.site.operation}, {case.direction}")


def by_autograd(
    function: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs, note: str = ""
) -> Implementation:
    """A function that autograd differentiates."""
    outputs: list[tuple[Tensor, ...]] = []

    def backward() -> Results:
        if not outputs:
            outputs.append(function(inputs))
        return torch.autograd.grad(outputs[0], inputs.leaves, inputs.gradients, retain_graph=True)

    return Implementation(lambda: function(inputs), backward, note)
