"""Keeps the recipe of a fused operation's output in place of the output, for the next backward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_active = 0


_RECIPE = "_bnres_recipe"


class Recipe:
    """How to make a fused operation's output again, to the bit.

    Args:
        make: the call that made it, as a function of ``tensors``.
        tensors: what it reads.
    """

    def __init__(self, make: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> None:
        self.make = make
        # Detached: they share memory and versions with what they come from, but no graph.
        self.tensors = [None if t is None else t.detach() for t in tensors]
        self.versions = [None if t is None else t._version for t in self.tensors]

    def __call__(self) -> Tensor:
        """The output.

        Raises:
            RuntimeError: if something it is made of was written in place since.
        """
        if self.versions != [None if t is None else t._version for t in self.tensors]:
            raise RuntimeError(
                "one of the tensors that a recomputed output is made of has been modified by an "
                "inplace operation"
            )
        with torch.no_grad():
            return self.make(*self.tensors)


def recomputes() -> bool:
    """Whether fused operations are to leave a recipe on their outputs."""
    return _active > 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def has_recipe(t: Tensor | None) -> bool:
    """Whether a tensor is an output that will be made again."""
    return t is not None and _RECIPE in t.__dict__


def leave_recipe(
    make: Callable[..., Tensor], tensors: Sequence[Tensor | None], *ys: Tensor
) -> None:
    """Says how the outputs ``ys``, one tensor returned once or twice, are made again."""
    recipe = Recipe(make, tensors)
    for y in ys:
        setattr(y, _RECIPE, recipe)


def pack(t: Tensor) -> Tensor | Recipe:
    """What is kept of a tensor that an operation saves for its backward."""
    recipe = t.__dict__.get(_RECIPE)
    return t if recipe is None or t._version else recipe


def unpack(packed: Tensor | Recipe) -> Tensor:
    """The tensor that was saved."""
    return packed() if isinstance(packed, Recipe) else packed


@contextmanager
def recompute() -> Iterator[None]:
    """In training, gives up fused outputs that the next layer keeps, and makes them again.

    Inside the ``with`` block, which holds the forward pass, a layer that saves the output of a
    fused operation for its backward (a convolution does) keeps the operation's inputs and
    statistics instead, which are kept anyway, and backward makes the output again by the same call:
    the same gradients to the bit, for one more pass over memory each. An output whose residual is
    itself made again is kept, so no chain is longer than one.

    It works on tensors that take our kernels, and does nothing inside torch.compile.
    """
    global _active
    _active += 1
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _active -= 1
