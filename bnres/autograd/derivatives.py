"""Derivatives of a formula that is a function of several tensors, some of them None."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

Formula = Callable[..., Tensor]
Gradients = tuple[Tensor | None, ...]
Tensors = Sequence[Tensor | None]


def alias(y: Tensor) -> Tensor:
    """Another tensor of the same memory and version, and, unlike a view, without a tie to ``y``.

    A view's base is kept by the view where no garbage collector sees it.
    """
    return y.detach()


def _of_chosen(formula: Callable[..., object], tensors: Tensors, chosen: Sequence[int]) -> Formula:
    """``formula`` as a function of the chosen tensors alone."""

    def run(*values: Tensor) -> object:
        filled = list(tensors)
        for i, value in zip(chosen, values, strict=True):
            filled[i] = value
        return formula(*filled)

    return run  # type: ignore[return-value]


def pullback(
    formula: Formula, dy: Tensor, tensors: Tensors, wanted: Sequence[int]
) -> tuple[Tensor, ...]:
    """Gradients of the ``wanted`` tensors, ``dy`` being that of the formula's value."""
    run = _of_chosen(formula, tensors, wanted)
    return torch.func.vjp(run, *[tensors[i] for i in wanted])[1](dy)


def _pullback_of(formula: Formula, wanted: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    """`pullback` as a function of dy, dy_skip and the tensors."""

    def run(dy: Tensor, dy_skip: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return pullback(formula, dy if dy_skip is None else dy + dy_skip, tensors, wanted)

    return run


def second_pullback(
    formula: Formula,
    inputs: Tensors,
    needed: Sequence[bool],
    grad_grads: Tensors,
) -> list[Tensor | None]:
    """Gradients of the ``needed`` of (dy, dy_skip, *tensors), through `pullback`.

    ``grad_grads`` are the gradients of the tensors' gradients, or None.
    """
    wanted = [i for i, gradient in enumerate(grad_grads) if gradient is not None]
    if not wanted:
        return [None] * len(needed)
    chosen = [i for i, need in enumerate(needed) if need]
    run = _of_chosen(_pullback_of(formula, wanted), inputs, chosen)
    vjp = torch.func.vjp(run, *[inputs[i] for i in chosen])[1]
    found = iter(vjp(tuple(grad_grads[i] for i in wanted)))
    return [next(found) if need else None for need in needed]


def jvp(run: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """The tangent of ``run(*primals)``, from inside a Function's jvp.

    `torch.func.jvp` opens a level of forward mode, which torch allows inside its own transforms
    alone. Elsewhere the pullback, which is linear, is transposed.
    """
    if torch._C._are_functorch_transforms_active():
        return torch.func.jvp(run, tuple(primals), tuple(tangents))[1]
    values, pull, *_ = torch.func.vjp(run, *primals)
    anywhere = pytree.tree_map(torch.zeros_like, values)
    return torch.func.vjp(pull, anywhere)[1](tuple(tangents))[0]


def pushforward(formula: Formula, tensors: Tensors, tangents: Tensors) -> Tensor:
    """The tangent of the formula's value."""
    chosen = [i for i, tangent in enumerate(tangents) if tangent is not None]
    run = _of_chosen(formula, tensors, chosen)
    return jvp(run, [tensors[i] for i in chosen], [tangents[i] for i in chosen])


def second_pushforward(
    formula: Formula, inputs: Tensors, tangents: Tensors, wanted: Sequence[int]
) -> tuple[Tensor, ...]:
    """The tangents of the ``wanted`` gradients that `pullback` finds."""
    chosen = [i for i, tangent in enumerate(tangents) if tangent is not None]
    run = _of_chosen(_pullback_of(formula, wanted), inputs, chosen)
    return jvp(run, [inputs[i] for i in chosen], [tangents[i] for i in chosen])
