"""The private parts of torch that fusion needs, except those of Inductor.

They are the same in torch 2.11, 2.13 and 2.14.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch.utils._pytree import tree_leaves as tree_leaves

from bnres.operations.sync_batch_norm_act import sync_batch_norm


def compiled(function: Callable[..., Any], backend: Any, **options: Any) -> Callable[..., Any]:
    """Returns ``function`` compiled by ``torch.compile``, with its own cache of graphs.

    torch stores at most ``torch._dynamo.config.recompile_limit`` graphs for each code object. All
    modules have the same code object for ``__call__``, so they would share this limit. Therefore
    each compiled function gets a new code object.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    # Dynamo must capture a call of `sync_batch_norm` as one node, not as the operations inside it.
    torch._dynamo.allow_in_graph(sync_batch_norm)
    return torch.compile(call, backend=backend, **options)


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Sets the function that runs when a module is called, as `torch.nn.Module.compile` does.

    If ``call`` is None, the module's own forward runs again. Copies of the module do not get
    ``call``.
    """
    module._compiled_call_impl = call


def uncompiled_call(module: nn.Module) -> Callable[..., Any]:
    """Returns a function that runs a module's forward and hooks, without torch.compile."""
    return module._call_impl


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was returned by ``torch.compile``."""
    return isinstance(module, torch._dynamo.OptimizedModule)


def in_fx_trace() -> bool:
    """Whether `torch.fx` is tracing. During such a trace, a compiled function raises an error."""
    return torch.fx._symbolic_trace.is_fx_symbolic_tracing()


def lookup_backend(name: Any) -> Callable[..., Any]:
    """Returns the backend called ``name``, or ``name`` itself if it is a backend."""
    return torch._dynamo.lookup_backend(name)  # type: ignore[attr-defined, no-any-return]


def module_tensors(graph: fx.Graph) -> set[int]:
    """Returns the ids of the fake tensors of parameters and buffers among a graph's inputs.

    A fake tensor has a shape and a dtype but no data. Dynamo does not record which inputs of a
    nested graph are parameters or buffers. But a nested graph gets the same fake tensors as the
    outer graph, so the ids identify them.
    """
    found = set()
    for node in graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None and "MODULE" in source.guard_source.name:
            found.add(id(node.meta["example_value"]))
    return found


def equal_shapes(a: torch.Size, b: torch.Size) -> bool:
    """Whether two shapes, which may have symbolic sizes, are equal in every call of a graph."""
    # Imported only here, because it imports sympy, which is slow.
    from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

    return statically_known_true(sym_eq(a, b))


def graph_breaks() -> dict[str, int]:
    """Returns how often each reason has caused a graph break in this process."""
    from torch._dynamo.utils import counters

    return dict(counters["graph_break"])


def not_captured() -> type[Exception]:
    """Returns the error class that ``torch.compile(fullgraph=True)`` raises at a graph break."""
    from torch._dynamo.exc import Unsupported

    return Unsupported
