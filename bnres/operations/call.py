"""Calls and differentiates the fused operations.

There are three ways to run an operation:

- Our kernels, inside an autograd Function. They compute first derivatives.
- The operation's formula, made of differentiable torch operations. Differentiating the formula
  gives higher derivatives and forward-mode derivatives.
- Torch's own operations (ATen), where our kernels can't run, for example on CPUs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.jit import is_tracing  # torch.compile can trace this function

from bnres.backend import uses_kernels
from bnres.kernels.torch_internals import (
    apply_plainly,
    in_dispatch_mode,
    in_forward_mode,
    in_transform,
    is_batched,
    is_exporting,
    is_watched,
    is_wrapped,
    mapped_levels,
    note_writes,
    outside_of_transforms,
    saves_through_hooks,
    unwrapped,
)
from bnres.operations.arguments import as_kernels_take, copy_back, packed_buffers
from bnres.operations.norms import empty_statistics, prepare_evaluation
from bnres.operations.operator import find_recording, kind_of, recording_of
from bnres.recipes import has_recipe, leave_recipe, recomputes

Gradients = tuple[Tensor | None, ...]

# Only these classes are ordinary tensors. Other subclasses of Tensor may override operations.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True, eq=False)
class Operation:
    """The functions that make up one fused operation.

    The functions take and return the operation's output y and these values:

    - ``inputs``: the tensors that may need gradients. The first is ``x``.
    - ``buffers``: all other tensors.
    - ``spec``: all arguments that are not tensors, among them ``training`` and ``needs_grad``.
    - ``kept``: the tensors that forward keeps for backward. The first is the statistics.
    - ``saved``: the fields of ``inputs``, followed by a field for each kept tensor.
    - ``recording``: the kernel launches of an earlier call of the same kind. If it is None, the
      function looks up the recording itself.

    Attributes:
        Inputs, Saved: types of ``inputs`` and ``saved``.
        writes: names of the buffers that training writes to.
        check: (inputs, buffers, spec) -> None. It raises an error for invalid arguments.
        aten: (inputs, buffers, spec) -> y, computed by torch's own operations.
        forward: (inputs, buffers, spec, recording=) -> y, followed by the kept tensors.
        saved: (inputs, y, kept, spec) -> the tensors that autograd saves for backward.
        backward: (dy, dy_skip, saved, spec, needed, recording) -> a gradient for each input, or
            None for an input whose field in ``needed`` is False. ``dy_skip`` is the gradient of
            the second y of a call with ``fork``, or None.
        formula: (saved, spec) -> y, computed by differentiable torch operations.
        again: (inputs, kept, spec) -> the same y, bit for bit, computed a second time. If ``again``
            is None, `bnres.recompute` stores y instead.
    """

    Inputs: Any
    Saved: Any
    writes: tuple[str, ...]
    check: Callable[..., None]
    aten: Callable[..., Tensor]
    forward: Callable[..., Any]
    saved: Callable[..., Any]
    backward: Callable[..., Any]
    formula: Callable[..., Tensor]
    again: Callable[..., Tensor] | None = None


def call(operation: Operation, inputs: Any, buffers: Any, spec: Any, fork: bool = False) -> Any:
    """Returns the operation's output y, or with ``fork`` y as two tensors that share memory."""
    y: Any
    if not uses_kernels(inputs.x):
        return _by_aten(operation, inputs, buffers, spec, fork)
    if not _is_plain(inputs) or recomputes():
        return _call_carefully(operation, inputs, buffers, spec, fork)
    recording = find_recording(kind_of(operation, spec, inputs, buffers))
    given = buffers
    if recording is None:
        operation.check(inputs, buffers, spec)
        inputs, buffers = as_kernels_take(inputs), packed_buffers(buffers, inputs.x)
        recording = recording_of(kind_of(operation, spec, inputs, buffers))
    if spec.needs_grad:
        y = apply_plainly(FusedEagerly, operation, spec, buffers, recording, fork, *inputs)
    else:
        y, *_ = Fused.forward(operation, spec, buffers, recording, False, *inputs)
        y = (y, y) if fork else y
    if spec.training and buffers is not given:
        copy_back(given, buffers, operation.writes)
    return y


def _call_carefully(operation: Operation, inputs: Any, buffers: Any, spec: Any, fork: bool) -> Any:
    """Does what `call` does, in cases where the fast path of `call` would be wrong.

    These cases are torch.func transforms, forward mode, dispatch modes, tracing, torch.compile,
    `bnres.recompute` and subclasses of Tensor.
    """
    if needs_aten(*inputs, *buffers):
        return _by_aten(operation, inputs, buffers, spec, fork)
    operation.check(inputs, buffers, spec)
    given, residual = buffers, inputs.residual
    inputs, buffers = as_kernels_take(inputs), packed_buffers(buffers, inputs.x)
    if not is_compiling() and in_forward_mode():
        y = _by_formula(operation, inputs, buffers, spec)
        return (y, y) if fork else y
    arguments = (operation, spec, buffers, None, fork and spec.needs_grad, *inputs)
    if is_compiling() and not spec.needs_grad:
        y, y_fork, *kept = Fused.forward(*arguments)
    else:
        y, y_fork, *kept = Fused.apply(*arguments)
    if spec.training:
        copy_back(given, buffers, operation.writes)
    outputs = (y,) if y_fork is None else (y, y_fork)
    if recomputes() and spec.needs_grad and operation.again and not has_recipe(residual):
        again, count = operation.again, len(inputs)

        def make(*tensors: Tensor) -> Tensor:
            return again(operation.Inputs(*tensors[:count]), tensors[count:], spec)

        leave_recipe(make, (*inputs, *kept), *outputs)
    return (y, outputs[-1]) if fork else y


def needs_aten(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors must run torch's own operations.

    An exported or traced program must also run where bnres is not installed. `torch.vmap` has no
    rules for our operators.
    """
    return (
        is_exporting() or is_tracing() or (not is_compiling() and any(map(mapped_levels, tensors)))
    )


def _by_aten(operation: Operation, inputs: Any, buffers: Any, spec: Any, fork: bool) -> Any:
    """Does what `call` does, by torch's own operations."""
    # torch.jit.trace warns whenever Python code reads a size, and the checks read sizes.
    if not is_tracing():
        operation.check(inputs, buffers, spec)
    y = operation.aten(inputs, buffers, spec)
    return (y, y) if fork else y


def _is_plain(inputs: Any) -> bool:
    """Whether all inputs are ordinary tensors and no transform, mode or compiler is active."""
    if is_compiling() or is_watched():
        return False
    for t in inputs:
        # A tensor that was returned from a transform may still be wrapped.
        if t is not None and (t.__class__ not in PLAIN_TYPES or is_wrapped(t)):
            return False
    return True


def _by_formula(operation: Operation, inputs: Any, buffers: Any, spec: Any) -> Tensor:
    """Returns y, computed by the operation's formula, which forward mode can differentiate.

    The formula does not update the buffers, so in training the kernels run too.
    """
    if spec.training and any(getattr(buffers, name) is not None for name in operation.writes):
        with outside_of_transforms():
            plain = type(buffers)(*map(unwrapped, buffers))
            without_grad = spec._replace(needs_grad=False)
            Fused.forward(operation, without_grad, plain, None, False, *map(unwrapped, inputs))
    statistics = None
    if not spec.training:
        statistics = empty_statistics(inputs.x, spec)
        prepare_evaluation(inputs, buffers, spec, statistics)
    return operation.formula(operation.Saved(*inputs, statistics), spec)


# The gradients of the first arguments of `Fused`: operation, spec, buffers, recording and fork.
NO_GRADIENTS = (None,) * 5


class Fused(Function):
    """Returns an operation's output y, a second y or None, and the tensors kept for backward.

    With ``fork`` there is a second y, which shares memory with the first y. In backward the kernels
    add the gradients of the two.
    """

    @staticmethod
    def forward(operation, spec, buffers, recording, fork, *inputs):
        y, *kept = operation.forward(operation.Inputs(*inputs), buffers, spec, recording=recording)
        if spec.training and not is_compiling():
            note_writes([getattr(buffers, name) for name in operation.writes])
        # The second y is detached. If it were a view, it would keep the first y alive by a
        # reference that the garbage collector can't see.
        return y, y.detach() if fork else None, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        operation, spec, _, recording, _, *tensors = inputs
        y, _, *kept = output
        ctx.mark_non_differentiable(*[t for t in kept if t is not None])
        _set_up(ctx, operation, spec, recording, tensors, y, kept)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_skip: Tensor | None = None, *_: Any) -> Gradients:
        operation, spec, recording = ctx.operation, ctx.spec, ctx.recording
        needed = operation.Inputs(*ctx.needs_input_grad[len(NO_GRADIENTS) :])
        if dy is None:
            dy, dy_skip = dy_skip, None
        if dy is None:
            return *NO_GRADIENTS, *(None for _ in needed)
        saved = operation.Saved(*ctx.saved_tensors)
        if ctx.layouts is not None:
            saved = operation.Saved(*map(_laid_out, saved, ctx.layouts))
        if is_compiling():
            return *NO_GRADIENTS, *operation.backward(dy, dy_skip, saved, spec, needed, None)
        # torch.autograd.grad(is_grads_batched=True) passes several gradients as one batched tensor,
        # which the kernels can't read.
        batched = is_batched(dy) or (dy_skip is not None and is_batched(dy_skip))
        by_formula = batched or in_forward_mode()
        if not (by_formula or torch.is_grad_enabled() or in_transform()):
            recording = None if in_dispatch_mode() else recording
            return *NO_GRADIENTS, *operation.backward(dy, dy_skip, saved, spec, needed, recording)
        kernels, formula = _gradients(operation, spec, needed)
        if by_formula or not torch.is_grad_enabled():
            found = iter(formula(dy, dy_skip, *saved))
        else:
            found = iter(WithFormula.apply(kernels, formula, dy, dy_skip, *saved))
        return *NO_GRADIENTS, *(next(found) if need else None for need in needed)


class FusedEagerly(Function):
    """Returns y, or with ``fork`` y twice. The fast path of `call` uses this Function, not `Fused`.

    `FusedEagerly` has no ``setup_context``. For a Function with ``setup_context``, torch binds the
    inputs to the signature of ``forward``. This takes five times as long as the rest of torch's
    work.
    """

    @staticmethod
    def forward(ctx, operation, spec, buffers, recording, fork, *inputs):
        y, y_fork, *kept = Fused.forward(operation, spec, buffers, recording, fork, *inputs)
        _set_up(ctx, operation, spec, recording, inputs, y, kept)
        return y if y_fork is None else (y, y_fork)

    backward = Fused.backward


def _set_up(
    ctx: Any,
    operation: Any,
    spec: Any,
    recording: Any,
    inputs: Sequence[Any],
    y: Tensor,
    kept: Sequence[Any],
) -> None:
    """Stores on ``ctx`` everything that backward needs."""
    ctx.set_materialize_grads(False)
    saved = operation.saved(operation.Inputs(*inputs), y, kept, spec)
    ctx.save_for_backward(*saved)
    ctx.layouts = None
    if not is_compiling() and saves_through_hooks():
        ctx.layouts = [None if t is None else (t.stride(), t.dtype) for t in saved]
    ctx.operation, ctx.spec, ctx.recording = operation, spec, recording


def _laid_out(t: Tensor | None, layout: Any) -> Tensor | None:
    """Undoes changes of strides and dtype that saved-tensor hooks made to a saved tensor."""
    if t is None or (t.stride(), t.dtype) == layout:
        return t
    strides, dtype = layout
    return torch.empty_strided(t.shape, strides, dtype=dtype, device=t.device).copy_(t)


def _gradients(operation: Any, spec: Any, needed: Any) -> tuple[Callable[..., Any], ...]:
    """Returns two functions that both compute the ``needed`` gradients.

    The first function runs the kernels. The second function differentiates the operation's formula,
    so its gradients can be differentiated again.
    """

    def by_kernels(dy: Tensor, dy_skip: Tensor | None, *saved: Tensor | None) -> Gradients:
        every = operation.backward(dy, dy_skip, operation.Saved(*saved), spec, needed, None)
        return tuple(gradient for gradient, need in zip(every, needed, strict=True) if need)

    def by_formula(dy: Tensor, dy_skip: Tensor | None, *saved: Tensor | None) -> Gradients:
        kept = operation.Saved(*saved)
        if kept.x is None:
            kept = kept._replace(x=torch.zeros_like(dy))
        names = [name for name, need in needed._asdict().items() if need]

        def y(*inputs: Tensor) -> Tensor:
            return operation.formula(kept._replace(**dict(zip(names, inputs, strict=True))), spec)

        # An input that was not saved does not affect the gradients, so zeros can replace it.
        inputs = [torch.zeros_like(kept.x) if (t := getattr(kept, n)) is None else t for n in names]
        return torch.func.vjp(y, *inputs)[1](dy if dy_skip is None else dy + dy_skip)

    return by_kernels, by_formula


class WithFormula(Function):
    """Returns ``run(*tensors)``, a tuple of tensors.

    ``run`` can't be differentiated. Backward differentiates ``formula``, which computes the same
    values.
    """

    @staticmethod
    def forward(run, formula, *tensors):
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, ctx.formula, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        _, _, *needed = ctx.needs_input_grad
        tensors = ctx.saved_tensors
        places = [i for i, need in enumerate(needed) if need]
        wanted = [i for i, grad in enumerate(grads) if grad is not None]
        if not wanted:
            return None, None, *(None for _ in needed)

        def formula(*inputs: Tensor) -> tuple[Tensor, ...]:
            given = list(tensors)
            for i, t in zip(places, inputs, strict=True):
                given[i] = t
            every = ctx.formula(*given)
            return tuple(every[i] for i in wanted)

        vjp = torch.func.vjp(formula, *(tensors[i] for i in places))[1]
        found = iter(vjp(tuple(grads[i] for i in wanted)))
        return None, None, *(next(found) if need else None for need in needed)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, run: Callable[..., Any], formula: Callable[..., Any], *tensors: Any
    ) -> tuple[Gradients, tuple[int, ...]]:
        _, _, *dims = in_dims
        found = torch.vmap(formula, tuple(dims))(*tensors)
        return found, (0,) * len(found)
