"""Makes custom operators from functions of named tuples, and records the launches of calls.

A recording holds the kernel launches of a call. It is repeated for later calls of the same kind,
which are the calls that `kind_of` gives the same key.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bnres.kernels.torch_internals import dispatches, in_dispatch_mode

# Maximum number of recordings; when it is reached, all recordings are discarded.
KINDS = 4096

_recordings: dict[Any, "Recording"] = {}


class Recording:
    """The kernel launches of calls of one kind.

    A call that has a recording needs no checks and no copies of its arguments, because an earlier
    call of the same kind has passed the checks.

    Attributes:
        forward: the launches of forward.
    """

    __slots__ = ("_backward", "forward")

    def __init__(self) -> None:
        from bnres.kernels.replay import Replay  # importing bnres does not need triton

        self.forward = Replay()
        self._backward: dict[Any, Replay] = defaultdict(Replay)

    def backward(self, asked: object, gradients: Sequence[Tensor | None]) -> Any:
        """The launches of backward for these requested results and dtypes of the gradients.

        The gradients must have the strides of the output.
        """
        return self._backward[asked, *[None if dy is None else dy.dtype for dy in gradients]]


def kind_of(called: object, options: object, *groups: Sequence[Tensor | None]) -> Any:
    """A key of everything that the checks and launches of an operation depend on."""
    return (
        called, options,
        *[
            None if t is None else (t.shape, t.stride(), t.dtype, t.device)
            for group in groups
            for t in group
        ],
    )  # fmt: skip


# Returns the recording for calls of a kind, or None if there is none yet.
find_recording = _recordings.get


def recording_of(kind: Any) -> Recording:
    """The recording for calls of this kind, created empty by the first call."""
    if kind not in _recordings:
        if len(_recordings) >= KINDS:
            _recordings.clear()
        _recordings[kind] = Recording()
    return _recordings[kind]


# The type of a field that is a tensor for some options and None for others.
Maybe = Any


class Gradients(NamedTuple):
    """The gradient of y, and the gradient of the second y or None.

    An operation returns a second y if it is called with ``fork``.
    """

    dy: Tensor
    dy_skip: Maybe


_SCHEMAS = {
    Tensor: "Tensor",
    Maybe: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    str: "str",
    tuple[int, ...]: "SymInt[]",
}


def operator(
    name: str,
    run: Callable[..., Any],
    allocate: Callable[..., Any],
    *,
    tensors: Sequence[Any],
    options: Sequence[Any],
    outputs: Any,
    writes: Sequence[str] = (),
) -> Callable[..., Any]:
    """A function that calls ``run`` in eager mode, and otherwise a custom operator that wraps it.

    The operator is called under torch.compile, in dispatch modes, and for tensors for which
    `dispatches` is true.

    Args:
        name: name of the operator.
        run: a function of a named tuple of each type in ``tensors``, a named tuple of each type in
            ``options``, and a recording.
        allocate: a function of the same named tuples that returns uninitialised outputs; it is the
            fake implementation of the operator.
        tensors: the types of the named tuples of tensors and None.
        options: the types of the named tuples of plain values.
        outputs: the type of the named tuple of tensors and None that ``run`` returns. The operator
            returns an empty tensor instead of None.
        writes: the fields that ``run`` writes to.

    Returns:
        A function with the arguments of ``run``. With a recording it always calls ``run``.
    """
    groups = (*tensors, *options)
    fields = [field for group in groups for field in get_type_hints(group).items()]
    arguments = []
    for i, (field, kind) in enumerate(fields):
        schema = _SCHEMAS[kind]
        if field in writes:
            schema = schema.replace("Tensor", f"Tensor(a{i}!)")
        arguments.append(f"{schema} {field}")
    returns = ", ".join("Tensor" for _ in outputs._fields)

    def grouped(values: Sequence[Any]) -> list[Any]:
        given: Iterator[Any] = (tuple(v) if isinstance(v, list) else v for v in values)
        return [group(*(next(given) for _ in group._fields)) for group in groups]

    def filled(values: Sequence[Any], found: Any) -> Any:
        given = tuple(values[0].new_empty(0) if t is None else t for t in found)
        return given if len(given) > 1 else given[0]

    def run_eagerly(*given: Any) -> Any:
        of_tensors, others = given[: len(tensors)], given[len(tensors) :]
        return run(*given, recording_of(kind_of(name, others, *of_tensors)))

    custom = torch.library.custom_op(
        f"bnres::{name}",
        lambda *values: filled(values, run_eagerly(*grouped(values))),
        mutates_args=writes,
        schema=f"({', '.join(arguments)}) -> ({returns})",
    )
    custom.register_fake(lambda *values: filled(values, allocate(*grouped(values))))

    def call(*given: Any, recording: Recording | None) -> Any:
        if recording is not None:
            return run(*given, recording)
        values = [value for group in given for value in group]
        if is_compiling() or in_dispatch_mode() or any(map(dispatches, values)):
            found = custom(*values)
            return outputs(*found) if len(outputs._fields) > 1 else outputs(found)
        return run_eagerly(*given)

    return call
