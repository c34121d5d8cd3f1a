"""The private parts of torch.compile that fusion uses, as they are in torch 2.11, 2.13 and 2.14."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from bnres.operations.sync_batch_norm_act import sync_batch_norm


def compiled(function: Callable[..., Any], backend: Any, **options: Any) -> Callable[..., Any]:
    """``torch.compile`` of a function, with a cache of graphs that no other function shares.

    torch stores the graphs per code object, at most ``torch._dynamo.config.recompile_limit``, and
    the ``__call__`` of all modules has the same code object.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    # Otherwise Dynamo would capture the operations in it.
    torch._dynamo.allow_in_graph(sync_batch_norm)
    return torch.compile(call, backend=backend, **options)


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Sets what a call of the module runs, like `torch.nn.Module.compile`; copies don't keep it."""
    module._compiled_call_impl = call


def uncompiled_call(module: nn.Module) -> Callable[..., Any]:
    """The module's call with its hooks, as it runs without `torch.nn.Module.compile`."""
    return module._call_impl


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` returned this module, whose keys then begin with ``_orig_mod.``."""
    return isinstance(module, torch._dynamo.OptimizedModule)


def lookup_backend(name: Any) -> Callable[..., Any]:
    """The backend with this name; a backend is returned unchanged."""
    return torch._dynamo.lookup_backend(name)  # type: ignore[attr-defined, no-any-return]


def module_tensors(graph: fx.Graph) -> set[int]:
    """The ids of the fake tensors of a graph's inputs that are attributes of modules.

    Nested graphs have the same fake tensors, but not the inputs' sources.
    """
    found = set()
    for node in graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None and "MODULE" in source.guard_source.name:
            found.add(id(node.meta["example_value"]))
    return found


def graph_breaks() -> dict[str, int]:
    """How often each reason has caused a graph break in this process."""
    from torch._dynamo.utils import counters

    return dict(counters["graph_break"])


def not_captured() -> type[Exception]:
    """The error of ``torch.compile(fullgraph=True)`` for a function that is not one graph."""
    from torch._dynamo.exc import Unsupported

    return Unsupported
