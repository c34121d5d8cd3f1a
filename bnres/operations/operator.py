"""Makes custom operators from functions that take named tuples, and stores recordings of calls.

A recording contains the kernel launches of a call. Later calls of the same kind repeat these
launches. Two calls are of the same kind if `kind_of` returns the same key for both.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bnres.kernels.torch_internals import dispatches, in_dispatch_mode

# When there are this many recordings, the next new kind of call discards them all.
KINDS = 4096

_recordings: dict[Any, "Recording"] = {}


class Recording:
    """The recorded kernel launches for one kind of call (see `kind_of`).

    If there is a recording for a call, the call's arguments are neither checked nor copied, because
    an earlier call of the same kind passed the checks and needed no copies.
    """

    __slots__ = ("_backward", "forward")

    def __init__(self) -> None:
        from bnres.kernels.replay import Replay  # importing bnres must not need triton

        self.forward = Replay()
        self._backward: dict[Any, Replay] = defaultdict(Replay)

    def backward(self, asked: object, gradients: Sequence[Tensor | None]) -> Any:
        """Returns the launches of backward for the results in ``asked``.

        The ``gradients`` must have the strides of y, because the launches are looked up by the
        dtypes of the gradients but not by their strides.
        """
        return self._backward[asked, *[None if dy is None else dy.dtype for dy in gradients]]


def kind_of(called: object, options: object, *groups: Sequence[Tensor | None]) -> Any:
    """Returns a key with everything that the checks and the launches of a call depend on."""
    return (
        called, options,
        *[
            None if t is None else (t.shape, t.stride(), t.dtype, t.device)
            for group in groups
            for t in group
        ],
    )  # fmt: skip


# find_recording(kind) returns the recording for calls of this kind, or None.
find_recording = _recordings.get


def recording_of(kind: Any) -> Recording:
    """Returns the recording for calls of this kind. If there is none, an empty one is stored."""
    if kind not in _recordings:
        if len(_recordings) >= KINDS:
            _recordings.clear()
        _recordings[kind] = Recording()
    return _recordings[kind]


# A field of this type is a tensor or None, depending on the options of the call.
Maybe = Any


class Gradients(NamedTuple):
    """The gradient of y, and the gradient of the second y that a call with ``fork`` returns.

    Without ``fork``, the second gradient is None.
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
    """Returns a function that calls ``run``, either directly or inside a custom operator.

    The custom operator is called under torch.compile, in dispatch modes, and for tensors whose
    class intercepts operators, such as fake tensors. Otherwise ``run`` is called directly.

    Args:
        name: name of the operator.
        run: a function that takes one named tuple of each type in ``tensors``, one named tuple of
            each type in ``options``, and a recording.
        allocate: the fake implementation of the operator. It takes the named tuples that ``run``
            takes, and returns uninitialised outputs.
        tensors: types of named tuples. Their fields are tensors or None.
        options: types of named tuples. Their fields are numbers, strings and tuples of numbers.
        outputs: the type of the named tuple that ``run`` returns. Its fields are tensors or None.
            The operator returns an empty tensor instead of None.
        writes: names of the fields that ``run`` writes to.

    Returns:
        A function with the arguments of ``run``, where the recording is passed by keyword. If the
        recording is not None, ``run`` is always called directly.
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
