"""Records a call's kernel launches, and repeats them in later calls of the same kind.

Two calls are of the same kind if their shapes, strides, dtypes, devices and options are equal, and
if the same tensors are None. Such calls launch the same kernels with the same arguments, except for
the tensors' addresses. A repeated launch takes less host time, because triton does not look for the
compiled kernel again.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from bnres.kernels import triton_internals
from bnres.kernels.launch import Launch, recorded_launches

# Triton compiles a separate kernel for pointers that are not multiples of this many bytes. Launches
# with such a pointer are not recorded.
POINTER_ALIGNMENT = 16
# Each tensor in scratch memory starts at a multiple of this many bytes.
SCRATCH_ALIGNMENT = 128

Groups = Sequence[Sequence[Tensor | None]]


class _Replayed(NamedTuple):
    """A recorded launch.

    ``pick`` selects the launch's pointers from the list of the call's pointers. ``numbers`` are the
    launch's other arguments.
    """

    compiled: CompiledKernel
    grid: tuple[int, ...]
    run: Callable[..., None]
    function: Any
    metadata: Any
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]
    numbers: tuple[Any, ...]


class _Derived(NamedTuple):
    """A pointer that is ``distance`` bytes after another pointer.

    ``base`` is the other pointer's index in the list of the call's pointers. ``dtype`` and
    ``numel`` describe the tensor that starts at the derived pointer.
    """

    base: int
    distance: int
    dtype: torch.dtype
    numel: int


class Replay:
    """The kernel launches of calls of one kind.

    Launches are recorded only if all tensors are aligned. The recording has no references to
    tensors. Each pointer of a launch points into one of the call's tensors or into scratch memory.
    Scratch memory replaces the temporary tensors that the recorded call allocated. It is the
    output's memory if that is possible, and otherwise is allocated at each call.
    """

    __slots__ = ("_derived", "_launches", "_ran", "_scratch", "_takes_addresses")

    def __init__(self) -> None:
        self._launches: list[_Replayed] = []
        self._derived: list[_Derived] = []
        self._scratch = 0
        self._takes_addresses = True
        self._ran: set[bool] = set()

    def run(self, call: Callable[..., object], groups: Groups, *options: object) -> None:
        """Runs ``call(*groups, *options)``, or repeats its launches if they are recorded.

        Args:
            call: function that only allocates tensors and launches kernels.
            groups: all tensors that ``call`` reads and writes, in the same order at each call of
                this kind. ``groups[0][0]`` is not None. ``groups[-1][0]`` is an output or None.
            options: all other values that ``call`` depends on, equal at each call of this kind.

        Raises:
            RuntimeError: if the first call of this kind runs while a CUDA graph is captured,
                because the driver can't load kernels during a capture. This also holds for the
                first call with unaligned tensors, whose kernels are compiled separately.
        """
        pointers: list[Any] = []
        bits = 0
        for group in groups:
            for t in group:
                if t is None:
                    pointers.append(0)
                else:
                    pointer = t.data_ptr()
                    bits |= pointer
                    pointers.append(pointer)
        x = groups[0][0]
        assert x is not None
        aligned = bits % POINTER_ALIGNMENT == 0
        if not (aligned and self._launches):
            self._run_first(lambda: call(*groups, *options), groups, aligned)
            return
        index = x.get_device()
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self._replay(groups, pointers, index)
        else:
            self._replay(groups, pointers, index)

    def _replay(self, groups: Groups, pointers: list[Any], index: int) -> None:
        scratch = None
        if self._scratch:
            device = groups[0][0].device  # type: ignore[union-attr]
            scratch = torch.empty(self._scratch, dtype=torch.uint8, device=device)
        if self._takes_addresses:
            pointers += 0, 0 if scratch is None else scratch.data_ptr()
            for base, distance, _, _ in self._derived:
                pointers.append(pointers[base] + distance)
        else:
            pointers = [*(t for group in groups for t in group), None, scratch]
            pointers += [_view(pointers[derived.base], derived) for derived in self._derived]
        if triton_internals.has_launch_hooks():
            for launch in self._launches:
                launch.compiled[launch.grid](*launch.pick(pointers), *launch.numbers)
            return
        stream = triton_internals.current_stream(index)
        for _, grid, run, function, metadata, pick, numbers in self._launches:
            run(*grid, stream, function, metadata, None, None, None, *pick(pointers), *numbers)

    def _run_first(self, call: Callable[[], object], groups: Groups, aligned: bool) -> None:
        x = groups[0][0]
        assert x is not None
        if aligned not in self._ran and x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "this fused operation has not run yet with tensors of these shapes, strides, "
                "dtypes and alignment, and its kernels can't be loaded while a CUDA graph is "
                "captured: make the same call once before the capture"
            )
        with recorded_launches() as launches:
            call()
        self._ran.add(aligned)
        # If a tensor is given as two arguments, a launch does not show which of them it reads.
        given = [id(t) for group in groups for t in group if t is not None]
        if (
            launches  # the list is empty if kernels are interpreted
            and aligned
            and len(set(given)) == len(given)
            and all(isinstance(launch.compiled, CompiledKernel) for launch in launches)
        ):
            self._record(launches, [t for group in groups for t in group], groups[-1][0])

    def _record(
        self, launches: list[Launch], tensors: list[Tensor | None], output: Tensor | None
    ) -> None:
        """Stores the launches, and the tensor or scratch memory to which each pointer points."""
        pointers = [[a for a in launch.arguments if _is_pointer(a)] for launch in launches]
        places = {id(t): i for i, t in enumerate(tensors) if t is not None}
        null, scratch_base = len(tensors), len(tensors) + 1
        others = {
            id(t): t for row in pointers for t in row if t is not None and id(t) not in places
        }
        insides = {key: _inside(t, tensors) for key, t in others.items()}
        scratch = {key for key, inside in insides.items() if inside is None}
        size = sum(_room_for(others[key]) for key in scratch)
        # The output's memory serves as scratch memory if it is large enough, and if the last launch
        # that uses scratch memory precedes the first launch that has the output as an argument.
        readers = [i for i, row in enumerate(pointers) if any(id(t) in scratch for t in row)]
        writers = [i for i, row in enumerate(pointers) if any(t is output for t in row)]
        if (
            output is not None
            and output.nbytes >= size
            and max(readers, default=0) < min(writers, default=-1)
        ):
            scratch_base, self._scratch = places[id(output)], 0
        else:
            self._scratch = size
        distance = 0
        derived: list[_Derived] = []
        for key, t in others.items():
            places[key] = len(tensors) + 2 + len(derived)
            derived.append(
                _Derived(*(insides[key] or (scratch_base, distance)), t.dtype, t.numel())
            )
            if insides[key] is None:
                distance += _room_for(t)
        self._derived = derived
        self._takes_addresses = triton_internals.takes_addresses()
        self._launches = [
            _Replayed(
                launch.compiled,
                launch.grid,
                *triton_internals.launch_parts(launch.compiled),
                _picker([null if t is None else places[id(t)] for t in row]),
                tuple(launch.arguments[len(row) :]),
            )
            for launch, row in zip(launches, pointers, strict=True)
        ]


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Returns a function that selects the items at ``places``, as a tuple."""
    return itemgetter(*places) if len(places) > 1 else lambda items: (items[places[0]],)


def _is_pointer(argument: object) -> bool:
    """Whether a kernel's argument is a tensor or None.

    In a launch's list of arguments, tensors and None come before all other arguments.
    """
    return argument is None or isinstance(argument, Tensor)


def _room_for(t: Tensor) -> int:
    """Returns a tensor's size in bytes, rounded up to a multiple of ``SCRATCH_ALIGNMENT``."""
    return -(-t.nbytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT


def _inside(t: Tensor, tensors: Sequence[Tensor | None]) -> tuple[int, int] | None:
    """Returns the index of the tensor in whose memory ``t`` starts, and the offset there in bytes.

    The result is None if ``t`` starts in none of the ``tensors``.
    """
    for i, whole in enumerate(tensors):
        if whole is not None and 0 <= t.data_ptr() - whole.data_ptr() < whole.nbytes:
            return i, t.data_ptr() - whole.data_ptr()
    return None


def _view(base: Tensor, derived: _Derived) -> Tensor:
    """Returns a tensor that starts at a derived pointer.

    A launcher that doesn't accept addresses gets this tensor instead of the pointer.
    """
    storage = base.untyped_storage()
    start = (base.data_ptr() - storage.data_ptr() + derived.distance) // derived.dtype.itemsize
    view = torch.empty(0, dtype=derived.dtype, device=base.device)
    return view.set_(storage, start, (derived.numel,), (1,))
