"""What bnres uses of torch that is not public, read in 2.11, 2.13 and 2.14."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
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
    """``t`` of every rank of the group with this name, one after another: (ranks, *)."""
    t = t.contiguous()
    ranks = distributed_c10d._get_group_size_by_name(group)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(t, ranks, group)
    return torch.ops._c10d_functional.wait_tensor(gathered).view(ranks, *t.shape)


def reduce_scatter(t: Tensor, group: Any) -> Tensor:
    """The sum over all ranks of what each has at this rank's place in ``t`` (ranks, *)."""
    t = t.contiguous()
    scattered = torch.ops._c10d_functional.reduce_scatter_tensor(t, "sum", len(t), group)
    return torch.ops._c10d_functional.wait_tensor(scattered)[0]


def unwrapped(t: Tensor | None) -> Tensor | None:
    """The tensor inside torch.func's wrappers, without what they know of derivatives."""
    while t is not None and is_wrapped(t):
        t = _functorch.get_unwrapped(t)
    return t


def mapped_levels(t: Tensor | None) -> set[int]:
    """The levels of nested `torch.vmap` calls that map over a dimension of ``t``."""
    levels = set()
    while t is not None and is_wrapped(t):
        if _functorch.is_batchedtensor(t):
            levels.add(_functorch.maybe_get_level(t))
        t = _functorch.get_unwrapped(t)
    return levels


def is_exporting() -> bool:
    """Whether `torch.export` is capturing.

    In torch 2.11 `torch.compiler.is_exporting` is also true inside torch.compile.
    """
    return torch.compiler._is_exporting_flag


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Inside, no torch.func transform, dispatch mode or tape notices what is done."""
    with torch._C._DisableFuncTorch(), torch.no_grad(), _disable_current_modes():
        yield


def in_forward_mode() -> bool:
    """Whether a tensor may have a tangent."""
    return forward_ad._current_level >= 0


def in_dispatch_mode() -> bool:
    """Whether a mode wants to see every operator."""
    return torch._C._len_torch_dispatch_stack() > 0


def dispatches(t: object) -> bool:
    """Whether ``t`` is of a subclass of tensors that wants to see every operator: fake, distributed."""
    dispatch = getattr(type(t), "__torch_dispatch__", None)
    return dispatch not in (None, torch._C._disabled_torch_dispatch_impl)


def is_watched() -> bool:
    """Whether anything besides autograd is active: a transform, a mode, a trace, forward mode."""
    return in_transform() or in_dispatch_mode() or in_forward_mode() or is_tracing()


def apply_plainly(function: type[Function], *inputs: Any) -> Any:
    """``function.apply(*inputs)``, outside of any transform and for tensors that left none.

    torch's own ``apply`` looks for both first.
    """
    return super(Function, function).apply(*inputs)  # type: ignore[misc]


def note_writes(tensors: Sequence[Tensor | None]) -> None:
    """Tells autograd that tensors were written to.

    `torch.autograd.graph.increment_version` does the same with checks, at four times the cost.
    """
    torch._C._increment_version([t for t in tensors if t is not None])


def saves_through_hooks() -> bool:
    """Whether tensors that autograd saves now go through `torch.autograd.graph.saved_tensors_hooks`."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
