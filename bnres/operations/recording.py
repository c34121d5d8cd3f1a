"""What is remembered of each kind of call: its operation, its options, and the tensors' metadata."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

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
        self._backward: dict[Any, Replay] = {}

    def backward(self, asked: object, gradients: Sequence[Tensor | None]) -> Any:
        """The launches of backward, which depend on what is asked for and on the gradients' dtypes.

        The gradients are stored in memory as the output is.
        """
        kind = (asked, *[None if dy is None else dy.dtype for dy in gradients])
        replay = self._backward.get(kind)
        if replay is None:
            replay = self._backward[kind] = type(self.forward)()
        return replay


def kind_of(name: str, options: object, *groups: Sequence[Tensor | None]) -> Any:
    """All that the checks and the launches of an operation depend on, as a key."""
    return (
        name, options,
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
    recording = _recordings.get(kind)
    if recording is None:
        if len(_recordings) >= KINDS:
            _recordings.clear()
        recording = _recordings[kind] = Recording()
    return recording
