"""How every fused operation is called: by ATen, by its operator or Function, or by its formula."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bnres.backend import uses_kernels
from bnres.kernels.torch_internals import (
    apply_plainly,
    in_forward_mode,
    is_watched,
    is_wrapped,
    outside_of_transforms,
    unwrapped,
)
from bnres.operations.function import Fused, FusedEagerly
from bnres.operations.recording import find_recording, kind_of, recording_of
from bnres.operations.tensors import as_kernels_take, copy_back, packed_buffers
from bnres.recipes import has_recipe, leave_recipe, recomputes

# Subclasses of tensors may override what operations do.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True, eq=False)
class Operation:
    """What one fused operation consists of.

    Its functions take and return named tuples. Inputs are the tensors that may need gradients; ``x`` is
    the first. Buffers are all other tensors. A spec holds every argument that is not a tensor, and
    ``training`` and ``needs_grad``. The forward pass returns y and what it keeps for backward; ``Saved``
    has the fields of the inputs, followed by those of what is kept.

    Attributes:
        name: name of the operation.
        Inputs, Saved: types of the named tuples.
        writes: names of the buffers that training writes to.
        check: (inputs, buffers, spec) -> None; raises for arguments that do not fit.
        aten: (inputs, buffers, spec) -> y, by torch's own operations.
        forward: (inputs, buffers, spec, recording=) -> y, followed by what is kept.
        saved: (inputs, kept, spec) -> saved.
        backward: (dy, dy_skip, saved, spec, needed, recording) -> a gradient for each input, None where
            it is not needed. dy_skip is the gradient of a second y, or None.
        formula: (saved, spec) -> y, by torch's operations, so that it can be differentiated.
        constants: (inputs, buffers, spec) -> what is kept, as far as ``formula`` reads it.
        again: (inputs, kept, spec) -> the same y, to the bit; None if `bnres.recompute` does not apply.
    """

    name: str
    Inputs: Any
    Saved: Any
    writes: tuple[str, ...]
    check: Callable[..., None]
    aten: Callable[..., Tensor]
    forward: Callable[..., Any]
    saved: Callable[..., Any]
    backward: Callable[..., Any]
    formula: Callable[..., Tensor]
    constants: Callable[..., Any]
    again: Callable[..., Tensor] | None = None


def call(operation: Operation, inputs: Any, buffers: Any, spec: Any, fork: bool = False) -> Any:
    """y; with ``fork`` two tensors of y that share their memory, one for each of two consumers."""
    y: Any
    if not uses_kernels(inputs.x):
        operation.check(inputs, buffers, spec)
        y = operation.aten(inputs, buffers, spec)
        return (y, y) if fork else y
    if not _is_plain(inputs) or recomputes():
        return _call_carefully(operation, inputs, buffers, spec, fork)
    recording = find_recording(kind_of(operation.name, spec, inputs, buffers))
    given = buffers
    if recording is None:
        operation.check(inputs, buffers, spec)
        inputs, buffers = as_kernels_take(inputs), packed_buffers(buffers, inputs.x)
        recording = recording_of(kind_of(operation.name, spec, inputs, buffers))
    if spec.needs_grad:
        y = apply_plainly(FusedEagerly, operation, spec, buffers, recording, fork, *inputs)
    else:
        y, *_ = Fused.forward(operation, spec, buffers, recording, False, *inputs)
        y = (y, y) if fork else y
    if spec.training and buffers is not given:
        copy_back(given, buffers, operation.writes)
    return y


def _call_carefully(operation: Operation, inputs: Any, buffers: Any, spec: Any, fork: bool) -> Any:
    """`call` under transforms, modes, torch.compile and `bnres.recompute`, and for other tensor types."""
    operation.check(inputs, buffers, spec)
    given, residual = buffers, getattr(inputs, "residual", None)
    inputs, buffers = as_kernels_take(inputs), packed_buffers(buffers, inputs.x)
    if not is_compiling() and in_forward_mode():
        y = _by_formula(operation, inputs, buffers, spec)
        return (y, y) if fork else y
    # torch.compile sums the gradients itself.
    separate = fork and spec.needs_grad and not is_compiling()
    arguments = (operation, spec, buffers, None, separate, *inputs)
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


def _is_plain(inputs: Any) -> bool:
    """Whether only autograd takes part, and all inputs are ordinary tensors."""
    if is_compiling() or is_watched():
        return False
    for t in inputs:
        # A tensor that was returned out of a transform is still wrapped.
        if t is not None and (t.__class__ not in PLAIN_TYPES or is_wrapped(t)):
            return False
    return True


def _by_formula(operation: Operation, inputs: Any, buffers: Any, spec: Any) -> Tensor:
    """y of inputs that may have tangents; in training it updates the buffers too.

    Raises:
        RuntimeError: if `torch.vmap` maps over x in training and there are buffers, which can't be
            updated by several batches at once.
    """
    if spec.training and any(getattr(buffers, name) is not None for name in operation.writes):
        x, *others = map(unwrapped, inputs)
        assert x is not None
        if x.shape != inputs.x.shape:
            raise RuntimeError("running statistics can't be updated by a batch that vmap maps over")
        with outside_of_transforms():
            plain = type(buffers)(*map(unwrapped, buffers))
            without_grad = spec._replace(needs_grad=False)
            Fused.forward(operation, without_grad, plain, None, False, x, *others)
    kept = operation.constants(inputs, buffers, spec)
    return operation.formula(operation.Saved(*inputs, *kept), spec)
