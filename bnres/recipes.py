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
        # Detached tensors share memory and version counters with the originals, but do not keep the
        # autograd graph alive.
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
    """Attaches a recipe to an operation's output ``ys``: one tensor, or two that share memory."""
    recipe = Recipe(make, tensors)
    for y in ys:
        setattr(y, _RECIPE, recipe)


def pack(t: Tensor) -> Tensor | Recipe:
    """Returns what autograd must store for ``t``: the recipe of ``t`` if there is one, else ``t``.

    A tensor that was written in place is stored itself, because its recipe no longer applies.
    """
    recipe = t.__dict__.get(_RECIPE)
    return t if recipe is None or t._version else recipe


def unpack(packed: Tensor | Recipe) -> Tensor:
    """Returns the saved tensor, or recomputes it if a recipe was saved."""
    return packed() if isinstance(packed, Recipe) else packed


@contextmanager
def recompute() -> Iterator[None]:
    """Recomputes the outputs of fused operations in backward instead of storing them.

    Run the forward pass inside the ``with`` block. A layer such as a convolution saves its input
    for backward. If a fused operation computed this input, the fused operation's inputs and
    statistics are saved instead. These tensors are in memory anyway. In backward, the same kernel
    computes the output again, so the gradients have the same bits as without the context.

    If an operation's residual will itself be recomputed, the operation's output is stored.
    Otherwise backward would have to recompute a chain of outputs.

    Only outputs of our kernels are recomputed. Inside torch.compile the context has no effect.
    """
    global _active
    if torch.compiler.is_compiling():
        yield
        return
    _active += 1
    try:
        # In a compiled model with graph breaks, operations outside of the graphs call these hooks.
        # Dynamo would raise an internal error if it captured the hooks.
        hooks = map(torch.compiler.disable, (pack, unpack))
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            yield
    finally:
        _active -= 1
