"""The private parts of torch.compile that fusion uses, as they are in torch 2.11, 2.13 and 2.14."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from bnres.operations.sync_batch_norm_act import sync_batch_norm


def compiled(function: Callable[..., Any], backend: Any, **options: Any) -> Callable[..., Any]:
    """Returns ``function`` compiled by ``torch.compile``, with a separate cache of graphs.

    torch stores at most ``torch._dynamo.config.recompile_limit`` graphs for each code object. The
    ``__call__`` of all modules is one code object, so modules would share this limit. Therefore
    each compiled function gets a new code object.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    # A call of `sync_batch_norm` becomes one node in the graph. Otherwise Dynamo would capture the
    # operations inside this function.
    torch._dynamo.allow_in_graph(sync_batch_norm)
    return torch.compile(call, backend=backend, **options)


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Sets the function that runs if the module is called, like `torch.nn.Module.compile`.

    Copies of the module do not keep this function.
    """
    module._compiled_call_impl = call


def uncompiled_call(module: nn.Module) -> Callable[..., Any]:
    """Returns the call of a module, including hooks, without `torch.nn.Module.compile`."""
    return module._call_impl


def is_compiled(module: nn.Module) -> bool:
    """Whether this module was returned by ``torch.compile``.

    The keys of such a module's state dict begin with ``_orig_mod.``.
    """
    return isinstance(module, torch._dynamo.OptimizedModule)


def in_fx_trace() -> bool:
    """Whether `torch.fx` is tracing. A compiled function raises an error in such a trace."""
    return torch.fx._symbolic_trace.is_fx_symbolic_tracing()


def lookup_backend(name: Any) -> Callable[..., Any]:
    """Returns the backend with this name. If ``name`` is a backend, it is returned unchanged."""
    return torch._dynamo.lookup_backend(name)  # type: ignore[attr-defined, no-any-return]


def module_tensors(graph: fx.Graph) -> set[int]:
    """Returns the ids of the fake tensors of those graph inputs that are attributes of modules.

    A fake tensor has a shape and a dtype but no data. For the inputs of a nested graph, Dynamo does
    not record whether they are attributes of modules. But a nested graph has the same fake tensors
    as the graph that contains it, so the ids identify its inputs too.
    """
    found = set()
    for node in graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None and "MODULE" in source.guard_source.name:
            found.add(id(node.meta["example_value"]))
    return found


def graph_breaks() -> dict[str, int]:
    """Returns how often each reason has caused a graph break in this process."""
    from torch._dynamo.utils import counters

    return dict(counters["graph_break"])


def not_captured() -> type[Exception]:
    """Returns the error class that ``torch.compile(fullgraph=True)`` raises at a graph break."""
    from torch._dynamo.exc import Unsupported

    return Unsupported
