"""Custom operators of functions of named tuples, and what is remembered of each kind of call."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bnres.kernels.torch_internals import dispatches, in_dispatch_mode

# Greatest number of kinds that are remembered.
KINDS = 4096

_recordings: dict[Any, "Recording"] = {}


class Recording:
    """Calls of one kind: their input is checked, needs no copies, and launches the same kernels.

    Attributes:
        forward: the launches.
    """

    __slots__ = ("_backward", "forward")

    def __init__(self) -> None:
        from bnres.kernels.replay import Replay  # importing bnres does not need triton

        self.forward = Replay()
        self._backward: dict[Any, Replay] = defaultdict(Replay)

    def backward(self, asked: object, gradients: Sequence[Tensor | None]) -> Any:
        """The launches of backward, which depend on what is asked for and on the gradients' dtypes.

        The gradients are stored in memory as the output is.
        """
        return self._backward[asked, *[None if dy is None else dy.dtype for dy in gradients]]


def kind_of(called: object, options: object, *groups: Sequence[Tensor | None]) -> Any:
    """All that the checks and the launches of an operation depend on, as a key."""
    return (
        called, options,
        *[
            None if t is None else (t.shape, t.stride(), t.dtype, t.device)
            for group in groups
            for t in group
        ],
    )  # fmt: skip


# What is known of calls of a kind, or None for the first one.
find_recording = _recordings.get


def recording_of(kind: Any) -> Recording:
    """What is known of calls of a kind; an empty recording for the first one."""
    if kind not in _recordings:
        if len(_recordings) >= KINDS:
            _recordings.clear()
        _recordings[kind] = Recording()
    return _recordings[kind]


# A field that is a tensor, or None where the options say so.
Maybe = Any


class Gradients(NamedTuple):
    """What backward operators take first: the gradients of y, which may have been returned twice."""

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
    """``run`` itself in eager mode; a custom operator of it for torch.compile and `dispatches`.

    Args:
        name: name of the operator.
        run: a function of named tuples, those of ``tensors`` before those of ``options``, and a recording.
        allocate: a function of the same named tuples that returns outputs without values: the fake.
        tensors: the types of the named tuples of tensors and None.
        options: the types of the named tuples of plain values.
        outputs: the type that ``run`` returns, of tensors and None. The operator returns an empty
            tensor in place of None.
        writes: the fields that ``run`` writes to.

    Returns:
        A function of what ``run`` takes. With a recording it is ``run``; the recording may be None.
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
