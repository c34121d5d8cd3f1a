"""Counts what a net's training step or inference does, without running its kernels.

The counts are the bytes saved for backward, the bytes moved, the Triton launches and the operations
of ATen. The optimiser's step is not counted. The net is in channels_last, on meta tensors, which
have no memory. TRITON_INTERPRET=1 has to be set, because only launches in the interpreter can be
skipped.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from bnres.recipes import Recipe, pack, recompute

Build = Callable[[], nn.Module]
# The keys are (operation, direction). The values are the bytes of the memory sectors that the
# operation touches, divided by the bytes of its input.
Sectors = Mapping[tuple[str, str], float]
# These operations of ATen only allocate memory.
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
# The first arguments of these operators are activations, which they read twice in training. The
# values are the numbers of these arguments.
TWICE = {"native_batch_norm": 1, "native_batch_norm_backward": 2}


@contextmanager
def no_launches() -> Iterator[list[int]]:
    """Inside the context, skips launches. Yields a list with one item, the number of them."""
    count = [0]

    def skip(self: GridExecutor, *arguments: Any, **named: Any) -> None:
        count[0] += 1

    with patch.object(GridExecutor, "__call__", skip):
        yield count


def _on_meta(build: Build, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Returns a net and its input, both on the meta device."""
    with torch.device("meta"):
        model: Any = build()
        x = torch.empty(shape, dtype=dtype)
    last = torch.channels_last
    return model.to(dtype=dtype, memory_format=last), x.contiguous(memory_format=last)


def held_bytes(
    build: Build, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16,
    *, recomputes: bool = False,
) -> int:  # fmt: skip
    """Counts the bytes that a forward in training saves for backward.

    Parameters and buffers are not counted. If ``recomputes``, the forward runs inside
    `bnres.recompute`.
    """
    model, x = _on_meta(build, shape, dtype)
    held: dict[int, torch.UntypedStorage] = {}

    def keep(t: Tensor) -> Tensor | Recipe:
        packed = pack(t)
        for each in packed.tensors if isinstance(packed, Recipe) else [packed]:
            if each is not None:
                storage = each.untyped_storage()
                held[storage._cdata] = storage
        return packed

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda packed: packed)
    with no_launches(), recompute() if recomputes else nullcontext(), hooks:
        y = model(x)
    del y
    parameters = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    return sum(s.nbytes() for key, s in held.items() if key not in parameters)


def launches(build: Build, shape: tuple[int, ...]) -> int:
    """Counts the Triton kernel launches of a training step in bf16."""
    model, x = _on_meta(build, shape, torch.bfloat16)
    with no_launches() as count:
        _step(model, x)
    return count[0]


class AtenCounts(TorchDispatchMode):
    """While active, counts ATen's operations, and the bytes that ATen's and bnres's ones move.

    Attributes:
        operations: number of ATen's operations that read or write memory. An operation makes one or
            more launches.
        moved: bytes that all operations except convolutions move. An ATen operation is assumed to
            read its arguments once (see ``TWICE`` for the exceptions) and to write its results
            once. An operation of bnres moves the bytes of its input times the value in ``sectors``
            for the operation and the direction.
    """

    def __init__(self, sectors: Sectors, training: bool) -> None:
        super().__init__()
        self.sectors, self.training = sectors, training
        self.operations = self.moved = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if op.namespace == "bnres":
            given = dict(zip([a.name for a in op._schema.arguments], args, strict=False))
            operation, direction = _our_operation(name, given)
            direction = direction if self.training else "eval"
            self.moved += round(self.sectors[operation, direction] * given["x"].nbytes)
        elif not (op.is_view or name in ALLOCATIONS):
            self.operations += 1
            if "convolution" not in name:
                read_again = args[: TWICE.get(name, 0)] if self.training else ()
                touched = [*tree_leaves((args, kwargs, found)), *read_again]
                self.moved += sum(t.nbytes for t in touched if isinstance(t, Tensor))
        return found


def aten_counts(
    build: Build, shape: tuple[int, ...], sectors: Sectors, dtype: torch.dtype = torch.bfloat16
) -> AtenCounts:
    """Counts the operations of ATen and the moved bytes of a training step."""
    model, x = _on_meta(build, shape, dtype)
    with no_launches(), AtenCounts(sectors, training=True) as counts:
        _step(model, x)
    return counts


def inference_bytes(build: Build, shape: tuple[int, ...], sectors: Sectors) -> int:
    """Counts the bytes that a forward in evaluation moves in bf16."""
    model, x = _on_meta(build, shape, torch.bfloat16)
    model.eval()
    with torch.no_grad(), no_launches(), AtenCounts(sectors, training=False) as counts:
        model(x)
    return counts.moved


def _step(model: nn.Module, x: Tensor) -> None:
    labels = torch.empty(len(x), dtype=torch.long, device="meta")
    F.cross_entropy(model(x), labels).backward()


def _our_operation(name: str, given: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the key in `Sectors` for a call of the operator ``name`` with arguments ``given``."""
    step = name.removeprefix("batch_norm_act_")
    fork = "_fork" if given.get("dy_skip") is not None else ""
    if given["pools"]:
        return f"bn_relu_pool{fork}", step
    if given["has_residual_norm"]:
        return f"dual_bn_add_relu{fork}", step
    added = given["residual"] is not None if step == "forward" else given["dresidual"]
    return f"{'bn_add_relu' if added else 'bn_relu'}{fork}", step
