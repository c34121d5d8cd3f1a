"""Private parts of torch that bnres uses, checked in the sources of torch 2.11, 2.13 and 2.14."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor
from torch.autograd import Function, forward_ad
from torch.distributed import distributed_c10d
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _disable_current_modes

_functorch = torch._C._functorch
in_transform = torch._C._are_functorch_transforms_active
is_wrapped = _functorch.is_functorch_wrapped_tensor
has_global_hooks = _has_any_global_hook
is_batched = _functorch.is_legacy_batchedtensor
is_tracing = torch._C._is_tracing


process_group_named: Callable[[Any], Any] = distributed_c10d._resolve_process_group


def all_gather(t: Tensor, group: Any) -> Tensor:
    """Returns the ``t`` of every process in the process group named ``group``: (processes, *)."""
    t = t.contiguous()
    ranks = distributed_c10d._get_group_size_by_name(group)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(t, ranks, group)
    return torch.ops._c10d_functional.wait_tensor(gathered).view(ranks, *t.shape)


def reduce_scatter(t: Tensor, group: Any) -> Tensor:
    """Returns the sum of ``t[r]`` over all processes of the group, where r is this process's rank.

    ``t`` is (processes, *).
    """
    t = t.contiguous()
    scattered = torch.ops._c10d_functional.reduce_scatter_tensor(t, "sum", len(t), group)
    return torch.ops._c10d_functional.wait_tensor(scattered)[0]


def unwrapped(t: Tensor | None) -> Tensor | None:
    """Returns the tensor inside the wrappers of torch.func.

    The wrappers' information on derivatives is lost.
    """
    while t is not None and is_wrapped(t):
        t = _functorch.get_unwrapped(t)
    return t


def mapped_levels(t: Tensor | None) -> set[int]:
    """Returns the levels of nested `torch.vmap` calls that map over a dimension of ``t``."""
    levels = set()
    while t is not None and is_wrapped(t):
        if _functorch.is_batchedtensor(t):
            levels.add(_functorch.maybe_get_level(t))
        t = _functorch.get_unwrapped(t)
    return levels


def is_exporting() -> bool:
    """Whether `torch.export` is capturing a program.

    `torch.compiler.is_exporting` is not used, because in torch 2.11 it also returns True inside
    torch.compile.
    """
    return torch.compiler._is_exporting_flag


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """A context that hides operations from torch.func transforms, dispatch modes and autograd."""
    with torch._C._DisableFuncTorch(), torch.no_grad(), _disable_current_modes():
        yield


def is_known(size: Any) -> bool:
    """Whether a size is known. While torch.compile captures a call, a size may be unknown."""
    # This is not imported at the top, because it imports sympy, which is slow.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active, so that tensors may have tangents."""
    return forward_ad._current_level >= 0


def in_dispatch_mode() -> bool:
    """Whether a ``TorchDispatchMode``, which intercepts every operator, is active."""
    return torch._C._len_torch_dispatch_stack() > 0


def dispatches(t: object) -> bool:
    """Whether the class of ``t`` intercepts operators, as fake and distributed tensors do."""
    dispatch = getattr(type(t), "__torch_dispatch__", None)
    return dispatch not in (None, torch._C._disabled_torch_dispatch_impl)


def is_watched() -> bool:
    """Whether a torch.func transform, dispatch mode, forward mode or trace is active."""
    return in_transform() or in_dispatch_mode() or in_forward_mode() or is_tracing()


def apply_plainly(function: type[Function], *inputs: Any) -> Any:
    """Returns ``function.apply(*inputs)``, without torch's checks for torch.func transforms.

    No transform may be active, and no input may be wrapped by a transform that has ended.
    """
    return super(Function, function).apply(*inputs)  # type: ignore[misc]


def note_writes(tensors: Sequence[Tensor | None]) -> None:
    """Tells autograd that tensors were written to.

    `torch.autograd.graph.increment_version` also checks its arguments and takes four times as long.
    """
    torch._C._increment_version([t for t in tensors if t is not None])


def saves_through_hooks() -> bool:
    """Whether `torch.autograd.graph.saved_tensors_hooks` apply to tensors that are saved now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
