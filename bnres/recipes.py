"""Saves how to recompute a fused operation's output for backward, instead of the output."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_active = 0


_RECIPE = "_bnres_recipe"


class Recipe:
    """Recomputes a fused operation's output, bit-equal.

    Args:
        make: a function of ``tensors`` that returns the output.
        tensors: the inputs and kept statistics of the operation.
    """

    def __init__(self, make: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> None:
        self.make = make
        # Detached tensors share memory and version counters with the originals, but have no graph.
        self.tensors = [None if t is None else t.detach() for t in tensors]
        self.versions = [None if t is None else t._version for t in self.tensors]

    def __call__(self) -> Tensor:
        """The recomputed output.

        Raises:
            RuntimeError: if one of the tensors has been written in place since.
        """
        if self.versions != [None if t is None else t._version for t in self.tensors]:
            raise RuntimeError(
                "one of the tensors needed to recompute an output has been modified by an inplace "
                "operation"
            )
        with torch.no_grad():
            return self.make(*self.tensors)


def recomputes() -> bool:
    """Whether fused operations must attach a recipe to their outputs."""
    return _active > 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def has_recipe(t: Tensor | None) -> bool:
    """Whether a tensor is an output that will be recomputed."""
    return t is not None and _RECIPE in t.__dict__


def leave_recipe(
    make: Callable[..., Tensor], tensors: Sequence[Tensor | None], *ys: Tensor
) -> None:
    """Attaches a recipe to the outputs ``ys``, which are one tensor, returned once or twice."""
    recipe = Recipe(make, tensors)
    for y in ys:
        setattr(y, _RECIPE, recipe)


def pack(t: Tensor) -> Tensor | Recipe:
    """The recipe of a saved tensor, or the tensor if it has no recipe or was written in place."""
    recipe = t.__dict__.get(_RECIPE)
    return t if recipe is None or t._version else recipe


def unpack(packed: Tensor | Recipe) -> Tensor:
    """The saved tensor, recomputed if a recipe was saved."""
    return packed() if isinstance(packed, Recipe) else packed


@contextmanager
def recompute() -> Iterator[None]:
    """Recomputes the outputs of fused operations in backward instead of storing them.

    Run the forward pass inside the ``with`` block. A layer that saves the output of a fused
    operation for backward, such as a convolution, then saves the operation's inputs and statistics
    instead, which are stored anyway. Backward recomputes the output by the same kernel, which costs
    one more pass over memory per output; the gradients are bit-equal. An output whose residual is
    recomputed is stored, so recomputing never needs another recomputation.

    It applies to tensors for which our kernels run, and does nothing inside torch.compile.
    """
    global _active
    _active += 1
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _active -= 1
