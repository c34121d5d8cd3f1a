"""Makes autograd save a recipe for a fused operation's output, instead of the output itself.

A recipe is a function and its arguments. Backward calls the function to compute the output again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_active = 0
_RECIPE = "_bnres_recipe"


class Recipe:
    """Computes a fused operation's output again, bit for bit.

    Args:
        make: a function of ``tensors`` that returns the output.
        tensors: the operation's inputs, and the tensors that the operation keeps for backward, such
            as the statistics.
    """

    def __init__(self, make: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> None:
        self.make = make
        # Detached tensors share memory and version counters with the originals, but have no
        # autograd graph.
        self.tensors = [None if t is None else t.detach() for t in tensors]
        self.versions = [None if t is None else t._version for t in self.tensors]

    def __call__(self) -> Tensor:
        """Returns the recomputed output.

        Raises:
            RuntimeError: if one of the tensors has been written in place since the recipe was made.
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
    """Whether a recipe is attached to a tensor."""
    return t is not None and _RECIPE in t.__dict__


def leave_recipe(
    make: Callable[..., Tensor], tensors: Sequence[Tensor | None], *ys: Tensor
) -> None:
    """Attaches a recipe to the tensors ``ys``, which are an operation's output.

    The output is one tensor, or two tensors that share memory.
    """
    recipe = Recipe(make, tensors)
    for y in ys:
        setattr(y, _RECIPE, recipe)


def pack(t: Tensor) -> Tensor | Recipe:
    """Returns what autograd must store when it saves ``t`` for backward.

    This is the tensor's recipe, or ``t`` itself if it has no recipe or was written in place.
    """
    recipe = t.__dict__.get(_RECIPE)
    return t if recipe is None or t._version else recipe


def unpack(packed: Tensor | Recipe) -> Tensor:
    """Returns the saved tensor. If a recipe was saved, the tensor is recomputed."""
    return packed() if isinstance(packed, Recipe) else packed


@contextmanager
def recompute() -> Iterator[None]:
    """Recomputes the outputs of fused operations in backward instead of storing them.

    Run the forward pass inside the ``with`` block. A layer such as a convolution saves its input
    for backward. If this input is the output of a fused operation, the fused operation's inputs and
    statistics are saved instead. They are in memory anyway. Backward runs the same kernel again to
    recompute the output. The gradients have the same bits as without the context.

    If an operation's residual is itself an output that will be recomputed, the operation's output
    is stored. To recompute this output, backward would first have to recompute the residual.

    Only outputs of our kernels are recomputed. Inside torch.compile the context has no effect.
    """
    global _active
    if torch.compiler.is_compiling():
        yield
        return
    _active += 1
    try:
        # After a graph break in a compiled model, operations run outside of the captured graphs and
        # call these hooks. If Dynamo captured the hooks, it would raise an internal error.
        hooks = map(torch.compiler.disable, (pack, unpack))
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            yield
    finally:
        _active -= 1
